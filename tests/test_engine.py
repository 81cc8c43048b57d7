"""What an engine reuses: which tokens of which chunks, from which store, whatever the text."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from oracles import distance
from tiny import PASSAGES, QUESTION, byte_tokenizer, prompt_of, tiny_backbone, tiny_model
from tokenizers.processors import TemplateProcessing

from cacheclip_rag import METHODS, Backbone, Engine
from cacheclip_rag.corpus import batches
from cacheclip_rag.methods import resolve
from cacheclip_rag.methods.select.query_guided import QueryGuided


def test_the_second_prompt_with_the_same_head_takes_its_kv_from_the_first(engine):
    prompt = prompt_of(engine, PASSAGES)
    first, second = (engine.prefill(prompt, method="naive") for _ in range(2))
    head = len(engine.backbone.tokenise(prompt[: prompt.index(PASSAGES[0])]))
    assert first.report.prefix == 0 and second.report.prefix == head
    assert second.report.fresh == first.report.fresh - head
    assert second.report.prompt_tokens == second.report.prefix + second.report.reused + second.report.fresh
    assert distance(second.logits, first.logits) < 1e-5
    other = engine.prefill(prompt_of(engine, PASSAGES, head="Read!"), method="naive")
    assert 0 < other.report.prefix < head, "a head that differs in its last words shares the rest"


@pytest.mark.parametrize(
    ("cut", "whole"),
    [(slice(None, 150), False), (slice(60, None), False), (slice(51, 160), False), (slice(None), True)],
)
def test_a_part_of_a_chunk_is_placed_where_it_stands(engine, cut, whole):
    """A truncated or re-split chunk takes the KV of just those tokens, moved to just those positions."""
    part = PASSAGES[1][cut].strip()
    prompt = prompt_of(engine, [PASSAGES[0], part])
    result = engine.prefill(prompt, method="naive")
    use = result.report.chunks[1]
    assert (use.reused, use.whole) == (len(part), whole)  # bytes are tokens here
    stored = engine.library.get(engine.library.key(PASSAGES[1]))
    tokens = slice(PASSAGES[1].index(part), PASSAGES[1].index(part) + len(part))
    row = len(engine.backbone.tokenise(prompt[: prompt.index(part)]))
    rows = slice(row, row + len(part))
    expected = engine.backbone.rotary.rotate(stored.keys[:, :, tokens], row - (stored.position + tokens.start))
    assert torch.allclose(result.canvas.keys[:, 0, :, rows], expected, atol=1e-5)
    assert torch.equal(result.canvas.values[:, 0, :, rows], stored.values[:, :, tokens])


def test_the_beginning_of_a_chunk_behind_its_prefix_is_exact(engine):
    """Causal KV of a chunk's beginning does not depend on what was cut off behind it."""
    prompt = engine.backbone.shared_prefix() + PASSAGES[0][:120] + "\n\nWho?<|im_end|>\n<|im_start|>assistant\n"
    naive, full = (engine.prefill(prompt, method=m) for m in ("naive", "full"))
    assert naive.report.reused == 120 and distance(naive.logits, full.logits) < 1e-4


def test_the_same_chunk_twice_is_reused_twice(engine):
    report = engine.prefill(prompt_of(engine, [PASSAGES[2], PASSAGES[0], PASSAGES[2]])).report
    assert [use.reused + use.recomputed for use in report.chunks] == [len(PASSAGES[i]) for i in (2, 0, 2)]


def test_a_prompt_that_ends_in_a_chunk_still_computes_its_last_token(engine):
    full = engine.prefill(PASSAGES[0], method="full")
    naive = engine.prefill(PASSAGES[0], method="naive")
    assert naive.report.fresh == 1 and naive.report.reused == len(PASSAGES[0]) - 1
    assert naive.logits.shape == full.logits.shape


def test_query_guided_works_when_the_question_comes_before_the_context(engine):
    prompt = f"{QUESTION}\n\n" + "\n\n".join(PASSAGES)
    report = engine.prefill(prompt, method="query_guided", recompute_ratio=0.3, question=QUESTION).report
    assert report.fallbacks == [] and report.recomputed > 0


def test_chunks_that_nobody_announced_are_plain_prefill_and_a_hint_is_only_advice(engine):
    text = "An unknown passage about nothing in particular, which is nevertheless long enough to be a chunk of its own."
    engine.hint([text, PASSAGES[0]], "some other question")
    report = engine.prefill(prompt_of(engine, [text])).report
    assert report.chunks == [] and report.fresh == report.prompt_tokens and report.fallbacks == []


def test_a_hinted_question_is_found_in_the_prompt_and_guides_the_choice(engine):
    seen: list[str] = []

    class Spy(QueryGuided):
        def select(self, request, budget):
            seen.append(request.question)
            rows = request.question_rows
            seen.append(request.layout.prompt[request.layout.offsets[rows[0], 0] : request.layout.offsets[rows[-1], 1]])
            return request.rows[:budget]

    method = resolve("query_guided")
    spy = type(method)("spy", Spy())
    engine.hint(PASSAGES, QUESTION)
    engine.prefill(prompt_of(engine, PASSAGES, f"Answer briefly. Query: {QUESTION}\nAnswer:"), method=spy)
    assert seen == [QUESTION, QUESTION]


def test_the_begin_of_sequence_token_is_no_edge_of_the_first_chunk():
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    engine = Engine(Backbone(tiny_model("llama"), tokenizer), method="naive")
    engine.ensure(PASSAGES)
    report = engine.prefill(f"{PASSAGES[0]}\n\nWho?").report
    assert report.edges == 0 and [use.computed for use in report.chunks] == [0]


def test_chunks_may_come_one_by_one(engine):
    """A corpus need not fit into memory, and what came before a source failed is kept."""

    def source():
        yield from (f"{passage} {number}" for number, passage in enumerate(PASSAGES * 8))
        raise OSError("the source failed")

    with pytest.raises(OSError, match="the source failed"):
        engine.ensure(source())
    assert engine.knows(f"{PASSAGES[0]} 0")


def test_a_question_longer_than_the_auxiliary_models_window_is_asked_by_its_end():
    helper = tiny_backbone("qwen3")
    helper.context_length = 512
    engine = Engine(tiny_backbone(), auxiliary=helper, method="cacheclip", recompute_ratio=0.2)
    engine.ensure(PASSAGES)
    long = "What was said before this. " * 30 + QUESTION
    report = engine.prefill(prompt_of(engine, PASSAGES, long), question=long).report
    assert report.fallbacks == [] and report.recomputed > 0
    tail = helper.tokenise("\n\n" + long, plain=True).ids[-(512 - len(engine.auxiliary.library.prefix_ids)) // 2 :]
    end = helper.tokenizer.decode(tail)
    for asked, same in [(end.strip(), True), (QUESTION, False)]:
        scores = [engine.auxiliary.score(PASSAGES, question)[0].scores for question in (long, asked)]
        assert scores[0].any() and (distance(*map(torch.from_numpy, scores)) < 0.05) == same


def test_nobody_elses_truncation_cuts_a_prompt(engine, tmp_path):
    """A tokenizer's truncation is switched on by any caller, or by the file it comes from."""
    prompt, backbone = prompt_of(engine, PASSAGES), engine.backbone
    whole, identity = backbone.tokenise_prompt(prompt).ids, backbone.fingerprint()
    backbone.tokenizer(prompt, truncation=True, max_length=16)
    assert torch.equal(backbone.tokenise_prompt(prompt).ids, whole) and backbone.fingerprint() == identity
    cutting = Backbone(backbone.model, backbone.tokenizer)
    assert torch.equal(cutting.tokenise_prompt(prompt).ids, whole) and cutting.fingerprint() == identity


@pytest.mark.parametrize(
    "text",
    ["\0" * 40 + "zero bytes in the middle of a passage that goes on for a while " + "\0" * 40,
     "🦜🌊⚓" * 30, "مرحبا بالعالم، هذه فقرة طويلة بما يكفي لتكون مقطعا. " * 3, "<|im_start|><|im_end|>" * 20],
    ids=["NUL", "emoji", "right-to-left", "control tokens"],
)  # fmt: skip
def test_strange_text_is_stored_recognised_and_answered(engine, text):
    assert engine.ensure([text]).skipped == []
    naive = engine.prefill(prompt_of(engine, [PASSAGES[0], text]), method="naive")
    assert naive.report.chunks[1].reused == len(text.strip().encode()) and naive.report.edges == 0


def test_a_thousand_chunks_in_one_prompt():
    engine = Engine(tiny_backbone(), method="naive")
    engine.backbone.context_length = 10**6
    texts = [
        f"{i:04d} is the number of this passage, and what follows is {i * 7919 % 1000} and nothing else."
        for i in range(1000)
    ]
    assert engine.ensure(texts).encoded == 1000
    report = engine.generate(prompt_of(engine, texts), max_new_tokens=2).report
    assert len(report.chunks) == 1000 and report.reused == sum(map(len, texts))


def test_anything_that_changes_kv_changes_the_namespace(tmp_path):
    def namespace(**options) -> str:
        backbone = options.pop("backbone", None) or tiny_backbone()
        return Engine(backbone, method="naive", **options).library.namespace.digest

    touched = tiny_model("llama")
    with torch.no_grad():
        touched.model.layers[2].mlp.up_proj.weight[3, 5] += 1e-3
    theta = tiny_model("llama")
    theta.config.rope_parameters = {"rope_type": "default", "rope_theta": 5000.0}
    spoken = byte_tokenizer()  # its template is no part of a tokenizer's definition, and chunks stand behind it
    spoken.chat_template = spoken.chat_template.replace("<|im_start|>{{", "<|im_start|>the {{")
    variants = {
        "as it is": namespace(),
        "template": namespace(backbone=Backbone(tiny_model("llama"), spoken)),
        "one weight": namespace(backbone=Backbone(touched, byte_tokenizer())),
        "rope": namespace(backbone=Backbone(theta, byte_tokenizer())),
        "dtype": namespace(backbone=tiny_backbone(dtype=torch.bfloat16)),
        "prefix": namespace(prefix="Documents:\n"),
        "tenant": namespace(tenant="someone else"),
    }
    assert len(set(variants.values())) == len(variants)
    assert namespace() == variants["as it is"]


def test_the_engine_s_prefix_is_that_of_every_method_a_request_names():
    engine = Engine(tiny_backbone(), prefix="Passages of a report.\n\n")
    engine.ensure(PASSAGES)
    prompt = prompt_of(engine, PASSAGES, head="Passages of a report.")
    for named in (None, "auto", "fusionrag", "naive", "cacheblend", "query_guided:group_size=4", engine.recipe("epic")):
        report = engine.prefill(prompt, method=named).report
        assert report.reused + report.recomputed > 0 and not report.fallbacks, named
    assert engine.ensure(PASSAGES, method="cacheblend").encoded == 0
    assert engine.fuse({PASSAGES[1]: PASSAGES[:1]}, method="fusionrag").encoded == 1
    for other in ("cacheblend:prefix=none", resolve("cacheblend"), "link0"):  # they say themselves what stands there
        assert engine.library_of(other) is not engine.library
        assert engine.prefill(prompt, method=other).report.fallbacks


def test_a_second_engine_over_the_same_folder_starts_from_the_stored_kv(tmp_path):
    first = Engine(tiny_backbone(), method="naive", store=tmp_path)
    assert first.ensure(PASSAGES).encoded == len(PASSAGES)
    expected = first.generate(prompt_of(first, PASSAGES), max_new_tokens=6)
    second = Engine(tiny_backbone(), method="naive", store=tmp_path)
    assert second.ensure(PASSAGES).encoded == 0
    again = second.generate(prompt_of(second, PASSAGES), max_new_tokens=6)
    assert again.ids == expected.ids and again.report.reused == expected.report.reused > 0
    other = Engine(tiny_backbone("qwen2"), method="naive", store=tmp_path)
    assert other.generate(prompt_of(other, PASSAGES), max_new_tokens=2).report.reused == 0, (
        "another model's KV is a miss"
    )
    first.forget(PASSAGES[:1])
    third = Engine(tiny_backbone(), method="naive", store=tmp_path)
    assert third.ensure(PASSAGES).encoded == 1


def test_an_interrupted_ingestion_keeps_what_was_finished_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(batches.TOGETHER, "cpu", 0)  # one by one
    engine = Engine(tiny_backbone(), method="naive", store=tmp_path)

    def interrupt(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.ensure(PASSAGES, progress=interrupt)
    again = Engine(tiny_backbone(), method="naive", store=tmp_path)
    assert again.ensure(PASSAGES).encoded == len(PASSAGES) - 2


def test_methods_are_values_that_name_themselves():
    assert all(name == method.name for name, method in METHODS.items())
    assert resolve("cacheclip", group_size=16).select.group_size == 16
    assert resolve("cacheclip") == resolve("cacheclip") and hash(resolve("cacheclip"))


def test_leaving_while_chunks_are_encoded_in_the_background_is_a_clean_exit(tmp_path):
    """A daemon thread that is inside torch when the interpreter goes away would abort the process."""
    script = (
        "from tiny import PASSAGES, tiny_backbone\n"
        "from cacheclip_rag import Engine\n"
        "engine = Engine(tiny_backbone(), method='naive')\n"
        "engine.ensure_later([passage * 8 for passage in PASSAGES] * 5)\n"
    )
    folder = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(folder.parent)])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_auxiliary_model_on_another_device_scores_while_kv_is_loaded(monkeypatch):
    """The same choice as in turn, begun before the first chunk is loaded."""
    helper = tiny_backbone("qwen3")
    engine = Engine(tiny_backbone(), auxiliary=helper, method="cacheclip", recompute_ratio=0.3)
    engine.ensure(PASSAGES)
    prompt = prompt_of(engine, PASSAGES)
    in_turn = engine.prefill(prompt)
    helper.device = torch.device("cpu", 0)  # equal to "cpu" in everything but its name
    began, score, get = threading.Event(), engine.auxiliary.score, engine.library.get
    monkeypatch.setattr(engine.auxiliary, "score", lambda *a: (began.set(), score(*a))[1])
    monkeypatch.setattr(engine.library, "get", lambda *a: get(*a) if began.wait(30) else None)
    beside = engine.prefill(prompt)
    assert beside.report.fallbacks == [] and torch.allclose(beside.logits, in_turn.logits, atol=1e-4)
