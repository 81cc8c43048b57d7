"""What training computes is what the engine computes from stored KV: the same logits, in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cacheclip_eval.data import Item, Passage, prompt
from cacheclip_train.rows import rows_of
from oracles import distance
from tiny import PASSAGES, tiny_backbone
from training import ITEM, SOFT, adapter, soft_tokens

from cacheclip_rag import Backbone, Engine
from cacheclip_rag.methods import resolve

pytest.importorskip("peft")

METHODS = ["blockattention", "turborag", "turborag:positions=shared", "naive", "link0"]


def cached(backbone: Backbone, method: str, item: Item, answer: torch.Tensor, ratio: float = 0.0) -> torch.Tensor:
    engine = Engine(backbone)
    assert engine.ensure([p.chunk for p in item.passages], method=method).skipped == []
    result = engine.prefill(prompt(item, backbone), method=method, recompute_ratio=ratio)
    assert result.report.fallbacks == [] and (ratio == 1.0 or result.report.reused > 100)
    return result.forced(answer.tolist())


def tuned(method: str, folder: Path) -> str:
    return f"{method}{',' if ':' in method else ':'}adapter={folder}"


CASES = [("llama", name) for name in METHODS if name != "link0"]
CASES += [(kind, "turborag:positions=shared") for kind in ("qwen3", "llama3-rope", "yarn-rope", "qwen2")]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_training_computes_what_the_cached_path_does(kind, method, tmp_path):
    backbone = tiny_backbone(kind)
    trained = adapter(backbone, tmp_path, method=method)
    apart, whole = trained.rows(ITEM, True), trained.rows(ITEM, False)
    answer = apart.ids[-apart.answer :]
    with torch.no_grad():
        ours, full = trained.logits(apart), trained.logits(whole)
    theirs = cached(backbone, tuned(method, tmp_path), ITEM, answer)
    assert distance(ours, theirs) < 1e-4
    assert distance(full, cached(backbone, tuned(method, tmp_path), ITEM, answer, ratio=1.0)) < 1e-4
    assert distance(full, ours) > 0.05, "or nothing depends on what a chunk sees"


SOFT_CASES = [(kind, name) for kind in ("llama", "qwen3", "yarn-rope", "qwen2") for name in SOFT]


@pytest.mark.parametrize(("kind", "method"), SOFT_CASES)
def test_training_soft_tokens_computes_what_the_cached_path_does(kind, method, tmp_path):
    backbone = tiny_backbone(kind)
    lora, answer = soft_tokens(backbone, tmp_path, method).lora, torch.tensor([72, 105, 33, 257])
    asked = resolve(method), prompt(ITEM, backbone), [p.chunk for p in ITEM.passages], answer
    with torch.no_grad():
        ours = lora.logits(rows_of(backbone, *asked, SOFT[method].tokens), len(answer) + 1)[:-1]
        without = lora.logits(rows_of(backbone, *asked), len(answer) + 1)[:-1]
    assert distance(ours, cached(backbone, tuned(method, tmp_path), ITEM, answer)) < 1e-4
    assert distance(without, ours) > 0.05, "or soft tokens do nothing"


@pytest.mark.parametrize("method", SOFT)
def test_soft_tokens_do_so_around_chunks_whose_edges_a_tokenizer_cuts_differently(smollm2, method, tmp_path):
    """The second of these passages begins inside a token of the prompt."""
    passages = [PASSAGES[0], f'"{PASSAGES[1]}"', PASSAGES[3]]
    text = f"Read.\n{passages[0]}\n\n({passages[1]})\n\n{passages[2]}\n\nWho built it?"
    lora, answer = soft_tokens(smollm2, tmp_path, method).lora, torch.tensor([260, 2])
    rows = rows_of(smollm2, resolve(method), text, passages, answer, SOFT[method].tokens)
    with torch.no_grad():
        ours = lora.logits(rows, len(answer) + 1)[:-1]
    engine = Engine(smollm2, method=tuned(method, tmp_path))
    assert engine.ensure(passages).skipped == []
    result = engine.prefill(text, recompute_ratio=0.0)
    assert result.report.fallbacks == [] and result.report.edges and result.report.reused > 100
    assert distance(ours, result.forced(answer.tolist())) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_it_does_so_with_a_real_tokenizer_that_cuts_edges_differently(smollm2, method):
    passages = (*ITEM.passages[:2], replace(ITEM.passages[2], title=""), Passage("", "  (" + PASSAGES[3] + ")\n"))
    item = replace(ITEM, passages=passages)
    answer = torch.cat([smollm2.tokenise("Marguerite Okafor").ids, torch.tensor([2])])
    rows = rows_of(smollm2, resolve(method), prompt(item, smollm2), [p.chunk for p in passages], answer)
    own = smollm2.model
    own.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            output = own(rows.ids[None], attention_mask=rows.mask[None, None], position_ids=rows.positions[None])
    finally:
        own.set_attn_implementation(smollm2.attention)
    theirs = cached(smollm2, method, item, answer)
    assert distance(output.logits[0, -len(answer) - 1 : -1], theirs) < 1e-4


def test_a_chunk_whose_edge_the_prompt_cuts_otherwise_keeps_its_own_tokens(smollm2):
    """The chunk's KV was computed with its own first token, which the prompt does not have."""
    text = f'"{PASSAGES[0]}"'
    messages = f"Read ({text})\n\nWho built it?"  # where ( and " are one token
    rows = rows_of(smollm2, resolve("blockattention"), messages, [text], torch.tensor([1, 2]))
    engine = Engine(smollm2)
    engine.ensure([text], method="blockattention")
    result = engine.prefill(messages, method="blockattention", recompute_ratio=0.0)
    assert result.report.fallbacks == [] and result.report.reused > 20
    assert len(rows) > len(result.layout) + 2, "the chunk's own tokens are there as well"
    own = smollm2.model
    own.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            output = own(rows.ids[None], attention_mask=rows.mask[None, None], position_ids=rows.positions[None])
    finally:
        own.set_attn_implementation(smollm2.attention)
    assert distance(output.logits[0, -3:-1], result.forced([1, 2])) < 1e-4


def test_no_row_of_a_chunk_sees_another_chunk_or_what_is_before_it():
    backbone = tiny_backbone()
    answer = torch.tensor([72, 257])
    rows = rows_of(backbone, resolve("turborag"), prompt(ITEM, backbone), [p.chunk for p in ITEM.passages], answer)
    assert rows.mask is not None
    seen = rows.mask.sum(dim=1)
    lengths = [len(backbone.tokenise(p.chunk)) for p in ITEM.passages]
    assert seen[: sum(lengths)].tolist() == [n + 1 for length in lengths for n in range(length)]
    assert seen[-1] == len(rows), "the last row sees all of them"
    assert bool(rows.mask.diagonal().all()), "a row without a key has no softmax"


@pytest.mark.parametrize("changes", [{"answers": ()}, {"answers": ("one", "two"), "all_answers": True}])
def test_a_question_without_one_right_answer_is_no_example(tmp_path: Path, changes: dict[str, object]) -> None:
    blocks = adapter(tiny_backbone(), tmp_path)
    assert blocks.fits(ITEM) and not blocks.fits(replace(ITEM, **changes))
