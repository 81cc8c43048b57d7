"""Soft tokens in a prompt: KVLink's, computed with each prompt, and KV Packet's, stored with the chunk."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import distance
from safetensors.torch import load_file, save_file
from test_recipes import ALL, AWKWARD
from tiny import PASSAGES, tiny_backbone, tiny_model
from torch import Tensor
from training import SOFT, adapter, soft_tokens

from cacheclip_rag import ConfigurationError, Engine
from cacheclip_rag.kv.encode import Packet
from cacheclip_rag.methods import METHODS, Method, resolve
from cacheclip_rag.methods.recompute.carry import Carry
from cacheclip_rag.methods.select.epic import LeadingTokens
from cacheclip_rag.model.adapter import CARD, library_version
from cacheclip_rag.prompt import Question, SoftTokens, Span, Tokens, align
from cacheclip_rag.report import TokenSource

pytest.importorskip("peft")

BOTH = pytest.mark.parametrize("name", ["kvlink", "kvpacket"])
EACH = {"kvlink": 3, "kvpacket": 6}
"""Soft tokens of a chunk."""


def folder_of(name: str, tmp_path: Path, kind: str = "llama", rank: int = 0, seed: int = 3) -> Path:
    """A folder without a card: soft tokens of random numbers, as `training.soft_tokens` makes them."""
    soft_tokens(tiny_backbone(kind), tmp_path / f"{name}{seed}", name, rank, seed)
    return tmp_path / f"{name}{seed}"


def method_of(name: str, folder: Path) -> str:
    return f"{name}:adapter={folder}"


@torch.inference_mode()
def by_mask(name: str, folder: Path, pieces: Sequence[str | list[str]], answer: Sequence[int] = ()) -> Tensor:
    """Eager transformers over the whole prompt with the papers' masks: logits ``[1 + A, V]`` from its last token on.

    ``pieces``: text outside chunks, and lists of one chunk. Positions are contiguous, soft tokens included.
    """
    model, tokenise = tiny_model("llama"), tiny_backbone().tokenise
    [file] = folder.glob("*.safetensors")
    before, behind = (load_file(file)[part] for part in ("before", "behind"))
    vectors, blocks = [], []  # of each row: what enters the model, and the block it is encoded in (0: none)
    for number, piece in enumerate(pieces):
        inner = model.get_input_embeddings()(tokenise(piece if isinstance(piece, str) else piece[0]).ids)
        if isinstance(piece, str):
            vectors, blocks = [*vectors, inner], [*blocks, 0]
        elif name == "kvpacket":
            vectors, blocks = [*vectors, torch.cat([before, inner, behind])], [*blocks, number]
        else:
            vectors, blocks = [*vectors, inner, behind], [*blocks, number, 0]
    vectors, blocks = [*vectors, model.get_input_embeddings()(torch.tensor(answer, dtype=torch.long))], [*blocks, 0]
    block = torch.cat([torch.full((len(part),), one) for part, one in zip(vectors, blocks, strict=True)])
    seen = torch.ones(len(block), len(block)).tril().bool() & ((block[:, None] == 0) | (block[:, None] == block))
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    output = model(inputs_embeds=torch.cat(vectors)[None], attention_mask=mask[None, None], use_cache=False)
    return output.logits[0, -1 - len(answer) :]


PIECES: list[str | list[str]] = ["<|im_start|>Read.\n\n"]
for _passage in PASSAGES[:4]:
    PIECES += [[_passage], "\n\n"]
PIECES += ["Who drove the last train?<|im_end|>\n"]
TEXT = "".join(piece if isinstance(piece, str) else piece[0] for piece in PIECES)


@BOTH
def test_a_prompt_and_its_answer_are_what_the_papers_mask_gives(name, tmp_path):
    folder = folder_of(name, tmp_path)
    engine = Engine(tiny_backbone(), method=method_of(name, folder))
    assert engine.ensure(PASSAGES).encoded == len(PASSAGES)
    answer = [72, 105, 33]
    result = engine.prefill(TEXT)
    assert result.report.fallbacks == [] and result.report.reused == sum(map(len, PASSAGES[:4]))
    expected = by_mask(name, folder, PIECES, answer)
    assert distance(result.logits, expected[:1]) < 1e-4
    assert distance(result.forced([*answer, 0]), expected) < 1e-4
    without = Engine(tiny_backbone(), method="promptcache")
    without.ensure(PASSAGES)
    assert distance(without.prefill(TEXT).logits, expected[:1]) > 0.05, "or soft tokens do nothing"


@BOTH
def test_decoding_takes_no_notice_of_them(name, tmp_path):
    """Drafts, penalties for repetition and other streams are about the text's tokens."""
    engines = [Engine(tiny_backbone(), prompt_lookup=most) for most in (10, 0)]
    method = method_of(name, folder_of(name, tmp_path))
    ids = []
    for engine in engines:
        engine.ensure(PASSAGES, method=method)
        ids.append(engine.generate(TEXT, method=method, max_new_tokens=24).ids)
        assert engine.generate(TEXT, method=method, max_new_tokens=4, repetition_penalty=1.3).report.fallbacks == []
    assert ids[0] == ids[1]
    expected = by_mask(name, tmp_path / f"{name}3", PIECES, ids[0][:-1])
    assert expected.argmax(dim=-1).tolist() == list(ids[0])


@BOTH
def test_the_report_counts_them_apart_from_the_text(name, tmp_path):
    engine = Engine(tiny_backbone(), method=method_of(name, folder_of(name, tmp_path)))
    engine.ensure(PASSAGES)
    for ratio in (0.0, 0.125, ALL):
        result = engine.prefill(TEXT, recompute_ratio=ratio)
        report = result.report
        assert report.soft_tokens == 4 * EACH[name] and "soft tokens beside the text" in str(report)
        assert report.prompt_tokens == len(result.layout) == len(TEXT.encode()) - 2 * len("<|im_start|>") + 4
        assert report.prompt_tokens == report.prefix + report.reused + report.recomputed + report.fresh
        assert sum(use.reused + use.recomputed for use in report.chunks) == sum(map(len, PASSAGES[:4]))
        assert report.recomputed == round(ratio * sum(map(len, PASSAGES[:4])))
        counts = report.token_sources.counts()
        assert report.token_sources.tokens == report.prompt_tokens
        assert counts[TokenSource.REUSED] == report.reused and counts[TokenSource.RECOMPUTED] == report.recomputed
    assert report.as_dict()["soft_tokens"] == 4 * EACH[name]
    whole = engine.prefill(TEXT, recompute_ratio=1.0)
    assert whole.report.soft_tokens == 0
    assert distance(whole.logits, Engine(tiny_backbone()).prefill(TEXT, method="full").logits) < 1e-4


@BOTH
@pytest.mark.parametrize("awkward", AWKWARD)
def test_awkward_prompts(name, awkward, tmp_path):
    engine = Engine(tiny_backbone(), method=method_of(name, folder_of(name, tmp_path)))
    engine.ensure(PASSAGES[:3])
    text = AWKWARD[awkward]
    for ratio in (0.0, 0.3, ALL):
        result = engine.prefill(text, recompute_ratio=ratio)
        report = result.report
        assert report.fallbacks == []
        assert report.prompt_tokens == report.prefix + report.reused + report.recomputed + report.fresh
        spans = len(report.chunks)
        last = spans > 0 and report.chunks[-1].end == len(text)  # nothing stands behind the prompt's last token
        assert report.soft_tokens == spans * EACH[name] - last * SOFT[name].behind
        tokens = torch.tensor([72, 101, 108])
        once = result.step(tokens, len(result.layout))
        apart = [result.step(tokens[i : i + 1], len(result.layout) + i) for i in range(3)]
        assert distance(torch.cat(apart), once) < 1e-4


def test_with_every_token_recomputed_link_tokens_are_tokens_of_an_ordinary_prompt(tmp_path):
    folder = folder_of("kvlink", tmp_path)
    engine = Engine(tiny_backbone(), method=method_of("kvlink", folder))
    engine.ensure(PASSAGES)
    result = engine.prefill(TEXT, recompute_ratio=ALL)
    behind = load_file(folder / "links.safetensors")["behind"]
    model, pieces = tiny_model("llama"), []
    for piece in PIECES:
        embedded = model.get_input_embeddings()(engine.backbone.tokenise("".join(piece)).ids)
        pieces += [embedded] if isinstance(piece, str) else [embedded, behind]
    with torch.no_grad():
        expected = model(inputs_embeds=torch.cat(pieces)[None]).logits[0, -1:]
    assert distance(result.logits, expected) < 1e-4


@BOTH
def test_they_go_with_every_way_to_select(name, tmp_path):
    folder = folder_of(name, tmp_path)
    engine = Engine(tiny_backbone(), auxiliary=tiny_backbone("qwen3"))
    encode = replace(METHODS[name].encode, adapter=str(folder))
    plain = engine.ensure(PASSAGES, method=Method("mine", LeadingTokens(), encode))
    assert plain.encoded == len(PASSAGES)
    found = []
    for other in ("random", "cacheblend", "cacheclip", "query_guided", "prophetkv", "infoflow", "ape", "psr"):
        part = METHODS[other]
        method = replace(part, name="mine", encode=encode, recompute_ratio=0.2)
        found.append(engine.prefill(TEXT, method=method))
    found.append(engine.prefill(TEXT, method=replace(METHODS["infoflow"], encode=encode, recompute=Carry())))
    for result in found:
        assert result.report.fallbacks == [] and result.report.soft_tokens == 4 * EACH[name]
        assert result.step(torch.tensor([65]), len(result.layout)).isfinite().all()


@BOTH
def test_their_kv_is_kept_apart_wherever_the_folder_is(name, tmp_path):
    folder, other = folder_of(name, tmp_path), folder_of(name, tmp_path, seed=4)
    store = tmp_path / "store"
    with Engine(tiny_backbone(), method="promptcache", store=store) as engine:
        assert engine.ensure(PASSAGES).encoded == len(PASSAGES)
        assert engine.ensure(PASSAGES, method=method_of(name, folder)).encoded == len(PASSAGES)
        expected = engine.prefill(TEXT, method=method_of(name, folder)).logits
    moved = folder.rename(tmp_path / "moved")
    with Engine(tiny_backbone(), method=method_of(name, moved), store=store) as engine:
        assert engine.ensure(PASSAGES).encoded == 0
        result = engine.prefill(TEXT)
        assert distance(result.logits, expected) < 1e-5 and result.report.soft_tokens
        assert engine.ensure(PASSAGES, method=method_of(name, other)).encoded == len(PASSAGES)
        engine.forget(PASSAGES[:1])
        for method in (moved, other):
            library = engine.library_of(method_of(name, method))
            assert len(list(library.store.entries())) == len(PASSAGES) - 1


@pytest.mark.parametrize("options", [{"kv_dtype": "int8"}, {"dtype": torch.bfloat16}])
def test_a_packet_in_fewer_bits_is_nearly_the_same(options, tmp_path):
    folder, dtype = folder_of("kvpacket", tmp_path), options.pop("dtype", torch.float32)
    engine = Engine(tiny_backbone(dtype=dtype), method=method_of("kvpacket", folder), **options)
    engine.ensure(PASSAGES)
    result = engine.prefill(TEXT)
    assert result.report.fallbacks == [] and distance(result.logits, by_mask("kvpacket", folder, PIECES)) < 0.1


def test_the_model_and_its_other_methods_stay_as_they_are(tmp_path):
    backbone = tiny_backbone()
    before, engine = backbone.state(), Engine(backbone)
    engine.ensure(PASSAGES, method="promptcache")
    plain = engine.prefill(TEXT, method="promptcache").logits
    for name in ("kvlink", "kvpacket"):
        method = method_of(name, folder_of(name, tmp_path, rank=2))
        engine.ensure(PASSAGES, method=method)
        assert distance(engine.prefill(TEXT, method=method).logits, plain) > 0.05
    assert torch.equal(engine.prefill(TEXT, method="promptcache").logits, plain)
    assert backbone.state() == before and backbone.soft == (0, 0)


def test_fused_packets_are_behind_packets(tmp_path):
    method = f"kvpacket:adapter={folder_of('kvpacket', tmp_path)},fused=True"
    engine = Engine(tiny_backbone(), method=method)
    engine.ensure(PASSAGES)
    engine.fuse({PASSAGES[1]: [PASSAGES[0]]})
    result = engine.prefill("".join([PASSAGES[0], "\n\n", PASSAGES[1], "\n\nWho was she?"]))
    assert result.report.fallbacks == [] and result.report.soft_tokens == 2 * EACH["kvpacket"]
    assert result.report.reused == len(PASSAGES[0]) + len(PASSAGES[1])


def test_no_room_for_them_is_a_full_prefill_that_says_so(tmp_path):
    backbone = tiny_backbone()
    engine = Engine(backbone, method=method_of("kvpacket", folder_of("kvpacket", tmp_path)))
    engine.ensure(PASSAGES)
    backbone.context_length = len(backbone.tokenise(TEXT)) + 20
    result = engine.prefill(TEXT)
    assert ["soft tokens" in reason for reason in result.report.fallbacks] == [True]
    assert distance(result.logits, engine.prefill(TEXT, method="full").logits) < 1e-4
    backbone.context_length += 8
    answer = engine.generate(TEXT, max_new_tokens=100)
    assert answer.report.fallbacks == [] and len(answer.ids) == 4, "28 tokens of room, of which soft tokens take 24"


def test_another_split_of_the_same_vectors_is_another_packet(tmp_path):
    folders = [folder_of("kvpacket", tmp_path / name) for name in ("a", "b")]
    file = next(folders[1].glob("*.safetensors"))
    vectors = torch.cat([load_file(file)[part] for part in ("before", "behind")])
    count = len(load_file(file)["before"]) - 1
    save_file({"before": vectors[:count].clone(), "behind": vectors[count:].clone()}, file)
    with Engine(tiny_backbone(), store=tmp_path / "store") as engine:
        for folder in folders:
            method = method_of("kvpacket", folder)
            assert engine.ensure(PASSAGES, method=method).encoded == len(PASSAGES)
            result = engine.prefill(TEXT, method=method)
            assert distance(result.logits, by_mask("kvpacket", folder, PIECES)) < 1e-4


def test_where_they_stand():
    soft, nothing = SoftTokens.of(2, 1, stored=True), SoftTokens.of(0, 0, stored=True)
    tokens = Tokens(torch.tensor([7, 8, 9]), torch.tensor([[0, 2], [2, 3], [3, 6]]))
    wrapped = soft.wrapped(tokens)
    assert wrapped.ids.tolist() == [-1, -2, 7, 8, 9, -3]
    assert wrapped.offsets.tolist() == [[0, 0], [0, 0], [0, 2], [2, 3], [3, 6], [6, 6]]
    assert torch.equal(soft.wrapped(wrapped).ids, wrapped.ids), "a chunk has them once"
    assert nothing.wrapped(tokens) is tokens


@pytest.mark.parametrize("stored", [True, False])
def test_rows_are_made_around_what_is_stored(stored):
    """A prompt with a chunk of four tokens, of which it cuts the first differently, and with a question around it."""
    soft, chunk = SoftTokens.of(2, 1, stored), Tokens(torch.arange(4), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4]]))
    offsets = torch.tensor([[n, n + 1] for n in range(7)])
    span, wrapped = Span(2, 6, "key", 0), soft.wrapped(chunk)
    layout = align("??abcd?", torch.tensor([9, 8, 7, 1, 2, 3, 6]), offsets, [span], [(wrapped.ids, wrapped.offsets)])
    around = soft.around(layout, [wrapped])
    assert around.ids.tolist() == [9, 8, 7, -1, -2, 1, 2, 3, -3, 6]
    assert around.offsets[3].tolist() == around.offsets[4].tolist() == [3, 3] and around.offsets[8].tolist() == [6, 6]
    assert around.chunk.tolist() == [-1, -1, -1, *[0 if stored else -1] * 2, 0, 0, 0, 0 if stored else -1, -1]
    assert around.token[around.reusable].tolist() == ([0, 1, 3, 4, 5, 6] if stored else [1, 2, 3])
    assert around.edge.tolist() == [False, False, True, *[False] * 7]
    assert Question("??abcd?", 0, 7).rows(around).tolist() == [0, 1, 2, 9], "soft tokens are no part of a question"
    whole = around.text_only()
    assert torch.equal(whole.ids, layout.ids) and torch.equal(whole.chunk, layout.chunk)
    assert soft.around(layout, [None]).ids.tolist() == layout.ids.tolist(), "a chunk without stored KV has none"


# ---- what is refused -------------------------------------------------------------------------------------------------


@BOTH
def test_without_a_folder_a_method_is_refused_by_the_name_of_the_command(name):
    engine, said = Engine(tiny_backbone()), f"cacheclip tune {SOFT[name].kind}"
    for use in (
        lambda: engine.prefill("Hello", method=name),
        lambda: engine.ensure(PASSAGES, method=name),
        lambda: Engine(tiny_backbone(), method=name),
    ):
        with pytest.raises(ConfigurationError, match=said):
            use()


@BOTH
def test_a_folder_of_something_else_is_refused(name, tmp_path):
    engine, lora = Engine(tiny_backbone()), tmp_path / "lora"
    adapter(tiny_backbone(), lora)
    other = {"kvlink": "kvpacket", "kvpacket": "kvlink"}[name]
    theirs = folder_of(other, tmp_path)
    (theirs / CARD).write_text(json.dumps({"uses": f"{other}:adapter=FOLDER"}))
    refused = {
        method_of(name, lora): f"cacheclip tune {SOFT[name].kind} trains it",
        method_of(name, theirs): f"use it as {other}:adapter={theirs}",
        method_of("blockattention", theirs): f"use it as {other}:adapter={theirs}",
        method_of(name, tmp_path / "none"): "no folder",
    }
    for method, said in refused.items():
        with pytest.raises(ConfigurationError, match=said):
            engine.prefill("Hello", method=method)
    with pytest.raises(ConfigurationError, match="has no card"):
        Engine(folder_of(name, tmp_path, seed=5))
    (theirs / CARD).write_text(json.dumps({"uses": f"{other}:adapter=FOLDER", "primary": {"name": "tiny"}}))
    with pytest.raises(ConfigurationError, match=f"no model: open tiny, with .*{other}:adapter={theirs}"):
        Engine(theirs)


@BOTH
def test_another_model_and_damage_are_refused(name, tmp_path, caplog, smollm2):
    folder = folder_of(name, tmp_path)
    with pytest.raises(ConfigurationError, match="embeddings have 576 numbers"):
        Engine(smollm2, method=method_of(name, folder))
    primary = {"name": "tiny", **tiny_backbone("qwen3").origin()}
    (folder / CARD).write_text(json.dumps({"primary": primary, "library": library_version()}))
    with pytest.raises(ConfigurationError, match="another model, tiny"):
        Engine(tiny_backbone(), method=method_of(name, folder))
    (folder / CARD).unlink()
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["behind"][0, 0] = float("nan")
    save_file(tensors, file)
    with caplog.at_level(logging.WARNING), pytest.raises(ConfigurationError, match="not finite"):
        Engine(tiny_backbone(), method=method_of(name, folder))
    file.write_bytes(b"nothing")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Engine(tiny_backbone(), method=method_of(name, folder))


def test_methods_differ_by_their_folder_only():
    assert isinstance(resolve("kvpacket:adapter=folder").encode, Packet)
    with pytest.raises(ConfigurationError, match="no parameter"):
        resolve("kvpacket:links=folder")
