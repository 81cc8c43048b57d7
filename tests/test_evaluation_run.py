"""Runs: what is computed once, what a stopped or failed run leaves, and what a row says. On a tiny random model."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from cacheclip_eval import Item, Passage, System, access, answers, references, rows, run
from cacheclip_eval.data import prompt, right_answer
from cacheclip_eval.tables import summarise
from tiny import PASSAGES, tiny_backbone, tiny_model

from cacheclip_rag import Backbone, ConfigurationError, Engine
from cacheclip_rag.methods import METHODS, resolve
from cacheclip_rag.prefill.compose import Prefill
from cacheclip_rag.spec import describe
from cacheclip_rag.verification import kl

ITEMS = [
    Item("1", "Who drove the last train?", ("Marguerite Okafor",), tuple(Passage("", p) for p in PASSAGES[:2])),
    Item("2", "When was the lighthouse built?", ("1874",), tuple(Passage("", p) for p in PASSAGES[1:3])),
]
NAIVE, HALF = System("naive", "naive"), System("half", "query_guided", 0.5)
LENGTH = 6
SIZE = 260  # the tiny models' vocabulary


class Counting(Engine):
    """Says which prefills it was asked for, and fails on demand."""

    def __init__(self, backbone: Backbone, **options: Any) -> None:
        super().__init__(backbone, method="query_guided", **options)
        self.asked: list[str] = []
        self.failing: set[str] = set()
        self.helpers: list[Any] = []

    def prefill(self, prompt: str, **options: Any) -> Any:
        method = options["method"] if isinstance(options["method"], str) else options["method"].name
        self.asked.append(method)
        self.helpers.append(self.auxiliary)
        if method in self.failing:
            raise RuntimeError(f"{method} is broken")
        return super().prefill(prompt, **options)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


@pytest.fixture
def engine(backbone: Backbone) -> Counting:
    return Counting(backbone)


def go(engine: Engine, path: Path, systems: list[System], items: list[Item] = ITEMS, **options: Any) -> int:
    return run(engine, items, systems, path, dataset="d", **({"max_new_tokens": LENGTH} | options))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- rows --------------------------------------------------------------------------------------------------------


def test_a_row_says_what_it_was_made_with_and_what_came_out(engine: Counting, tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    system = System("wide", "infoflow", 0.25, parameters={"group_size": 4})
    assert go(engine, path, [system], ITEMS[:1]) == 0
    full, wide = lines(path)
    assert (full["dataset"], full["id"], full["system"], wide["system"]) == ("d", "1", "full", "wide")
    assert full["method"] == describe(METHODS["full"]) and wide["method"] == describe(resolve("infoflow", group_size=4))
    assert "group_size=4" in wide["method"] and wide["version"] == access.version()
    assert (full["requested_ratio"], wide["requested_ratio"]) == (1.0, 0.25)
    assert full["ratio"] is None and 0.2 < wide["ratio"] <= 0.25
    assert wide["ratio"] == wide["recomputed"] / (wide["reused"] + wide["recomputed"])
    for row in (full, wide):
        assert row["ttft"] > 0 and row["seconds"]["recompute"] > 0 and row["fallbacks"] == []
        assert row["prompt_tokens"] == row["prefix"] + row["reused"] + row["computed"]
    chunks = [engine.library.get(engine.library.key(p)) for p in PASSAGES[:2]]
    assert wide["stored_bytes"] == sum(c.nbytes for c in chunks) > 0 == full["stored_bytes"]
    assert wide["stored_tokens"] == sum(map(len, chunks)) == sum(map(len, PASSAGES[:2]))  # bytes are tokens here
    assert wide["auxiliary_bytes"] == 0 and wide["auxiliary"] is None
    assert full["kl"] == 0.0 and full["agree"] == 1.0 and wide["kl"] > 0


def test_a_system_that_recomputes_everything_is_full_prefill(engine: Counting, tmp_path: Path) -> None:
    go(engine, tmp_path / "rows.jsonl", [System("all", "query_guided", 1.0), NAIVE])
    for item in ("1", "2"):
        full, same, naive = (r for r in lines(tmp_path / "rows.jsonl") if r["id"] == item)
        assert same["answer"] == full["answer"] and same["kl"] < 1e-6 and same["agree"] == 1.0
        assert naive["kl"] > 1e-3


def test_the_auxiliary_model_s_chunks_are_counted_and_its_identity_is_said(backbone: Backbone, tmp_path: Path) -> None:
    first, second = (Backbone(tiny_model("llama", seed=seed), backbone.tokenizer) for seed in (1, 2))
    engine = Counting(backbone, auxiliary=first)
    other = Engine(backbone, auxiliary=second).auxiliary
    own = engine.auxiliary
    systems = [
        NAIVE,
        System("b", "cacheclip", 0.3, other),
        System("a", "cacheclip", 0.3),
        System("c", "cacheclip", 0.2, other),
    ]
    go(engine, tmp_path / "rows.jsonl", systems, ITEMS[:1])
    by = {row["system"]: row for row in lines(tmp_path / "rows.jsonl")}
    assert by["a"]["auxiliary"] != by["b"]["auxiliary"] is not None and by["naive"]["auxiliary"] is None
    assert engine.helpers == [own, own, other, own, other]  # full prefill's first
    # All three are models of one shape.
    assert by["a"]["auxiliary_bytes"] == by["b"]["auxiliary_bytes"] == by["a"]["stored_bytes"] > 0
    assert by["naive"]["auxiliary_bytes"] == 0 and engine.auxiliary is own


def test_what_an_engine_cannot_say_is_null(engine: Counting) -> None:
    assert access.stored(engine.library, PASSAGES[:1]) is None  # nothing is kept yet
    assert access.left(engine, resolve("cachecraft"), PASSAGES[:1], 0) is None
    assert engine.library_of(resolve("naive", prefix="x")) is not engine.library  # encoded in another way
    engine.ensure(PASSAGES[:1])
    assert access.stored(engine.library, [PASSAGES[0], PASSAGES[0]]) == access.stored(engine.library, PASSAGES[:1])


def test_what_methods_keep_of_earlier_prompts_is_counted(backbone: Backbone, tmp_path: Path) -> None:
    """Two orders of A and B: one variant each, with four bytes a token beside its KV; blocks and documents once where
    both prompts begin alike. After them B and C, in two orders: B, behind C now, leaves a second variant.
    """
    ready, path = Engine(backbone, method="naive"), tmp_path / "rows.jsonl"
    go(ready, path, [NAIVE, *(System(name, name) for name in ("cachecraft", "prefix-cache", "ragcache"))])
    by = {(row["id"], row["system"]): row for row in lines(path)}
    [a, b, c] = [ready.library.get(ready.library.key(p)) for p in PASSAGES[:3]]
    token = 2 * a.keys[:, :, :1].nbytes
    for number, pair in {"1": (a, b), "2": (b, c)}.items():
        naive, harvested = by[number, "naive"], by[number, "cachecraft"]
        assert naive["stored_bytes"] == sum(chunk.nbytes for chunk in pair)
        assert harvested["stored_tokens"] == naive["stored_tokens"] == sum(map(len, pair))
    assert by["1", "cachecraft"]["stored_bytes"] == a.nbytes + b.nbytes + 4 * (len(a) + len(b))
    variants = [len(ready.variants_of("cachecraft", p)) for p in PASSAGES[:3]]
    assert variants == [1, 2, 1]
    assert by["2", "cachecraft"]["stored_bytes"] == 2 * b.nbytes + c.nbytes + 4 * (2 * len(b) + len(c))
    turned = dataclasses.replace(ITEMS[0], passages=ITEMS[0].passages[::-1], question="What are these passages about?")
    now, earlier = (backbone.tokenise(prompt(item, backbone)).ids.tolist() for item in (ITEMS[0], turned))
    alike = next(n for n, (x, y) in enumerate(zip(now, earlier, strict=False)) if x != y)
    blocks = len(now) // 16 + len(earlier) // 16 - alike // 16
    assert by["1", "prefix-cache"]["stored_bytes"] == 16 * blocks * token
    head, tail = (
        len(backbone.tokenise(part).ids) for part in prompt(ITEMS[0], backbone).split("\n\n".join(PASSAGES[:2]))
    )
    documents = len(now) - head - tail
    assert by["1", "ragcache"]["stored_bytes"] == (head + 2 * documents) * token
    assert by["1", "ragcache"]["auxiliary_bytes"] == 0 and by["1", "ragcache"]["kl"] < 1e-6
    assert access.written(ready, resolve("naive")) == 0


def test_scores(tmp_path: Path) -> None:
    item = Item("1", "Who?", ("Otto", "Bo Otto"), ())
    plain = answers.scores(item, "Otto", "Otto Bo", 0.5)
    assert (plain["score"], plain["em"], plain["kl"]) == (1.0, 1.0, 0.5) and plain["agree"] == pytest.approx(2 / 3)
    every = answers.scores(Item("1", "", ("Otto", "Bo"), (), all_answers=True), "Otto", "Otto", 0.0)
    assert every["score"] == 0.5 and every["agree"] == 1.0
    contained = Item("1", "", ("12",), (), meta={"all_answers_required": False})
    assert answers.score(contained, "It is 12, then.") == 1.0
    for answer in ("", "A", "The", "?"):  # "A" is what multiple choice is answered with
        assert answers.scores(item, answer, answer, 0.0)["agree"] == 1.0
    for a, b in (("", "Otto"), ("Otto", ""), ("A", "B")):
        assert answers.scores(item, a, b, 0.0)["agree"] == 0.0


def spy(prefill: Prefill) -> tuple[Prefill, list[int]]:
    """The same prefill, and the rows that its decoding steps compute."""
    taken: list[int] = []

    def step(token: torch.Tensor, row: int) -> torch.Tensor:
        taken.append(row)
        return prefill.step(token, row)

    return dataclasses.replace(prefill, step=step), taken


def test_decoding_after_forcing_is_plain_decoding(engine: Counting) -> None:
    """Steps shared with the forced answer are not taken twice, and the answer is what it is without forcing."""
    engine.ensure(PASSAGES)
    text = prompt(ITEMS[0], engine.backbone)
    want = list(engine.generate(text, method="naive", max_new_tokens=12).ids)
    for forced in (want, want[:4] + [65] * 8, [65] * 12, want[:1], want + [65] * 4):
        spied, taken = spy(engine.prefill(text, method="naive", room=40))
        logits = spied.forced(forced)
        assert logits.shape == (len(forced), SIZE)
        count = len(taken)
        assert answers.decode(engine, spied, [forced], logits, 12) == want
        common = next((i for i, (a, b) in enumerate(zip(want, forced, strict=False)) if a != b), len(forced))
        assert len(taken) - count == max(0, len(want) - 1 - min(common, len(forced) - 1))


def test_a_known_answer_is_verified_in_one_forward(engine: Counting) -> None:
    """Where a greedy answer is one that another system gave, it takes one step; where it only begins so, it is still
    the greedy answer."""
    engine.ensure(PASSAGES)
    text = prompt(ITEMS[0], engine.backbone)
    want = list(engine.generate(text, method="naive", max_new_tokens=12).ids)
    other = [65] * 12
    for known, most in (([other, want], 1), ([other, want[:6] + [65] * 6], 7), ([want[:3] + [65] * 9, want], 1)):
        spied, taken = spy(engine.prefill(text, method="naive", room=40))
        logits = spied.forced(known[0])
        count = len(taken)
        assert answers.decode(engine, spied, known, logits, 12) == want
        assert len(taken) - count <= most


# ---- going on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["naive", "cacheblend", "ape", "sel", "psr"])
def test_forcing_all_tokens_at_once_is_forcing_one_by_one(engine: Counting, method: str) -> None:
    item, forced = ITEMS[0], list(range(40, 52))
    access.ensure(engine, item, resolve(method))
    ready = [engine.prefill(prompt(item, engine.backbone), method=method, room=20) for _ in range(2)]
    start = len(ready[0].layout)
    steps = [ready[0].step(torch.tensor([token]), start + place) for place, token in enumerate(forced[:-1])]
    together = ready[1].forced(forced)
    torch.testing.assert_close(together, torch.cat([ready[0].logits, *steps]), atol=1e-4, rtol=1e-3)


def test_rows_of_an_earlier_run_are_not_repeated(engine: Counting, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    go(engine, path, [NAIVE])
    before, engine.asked[:] = path.read_bytes(), []
    go(engine, path, [NAIVE])
    assert path.read_bytes() == before and engine.asked == []
    go(engine, path, [NAIVE, HALF])
    assert engine.asked == ["query_guided"] * 2 and path.read_bytes().startswith(before)
    run(engine, ITEMS[:1], [NAIVE], path, dataset="e", max_new_tokens=LENGTH)
    assert engine.asked[2:] == ["naive"]  # another data set, the same prompt: its reference is known
    assert [(r["dataset"], r["system"]) for r in lines(path)[-2:]] == [("e", "full"), ("e", "naive")]


@pytest.mark.parametrize("stop", range(4))
def test_a_run_killed_anywhere_loses_the_answer_in_work(
    engine: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    path = tmp_path / "rows.jsonl"
    real, calls = answers.measure, []

    def killed(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(answers, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        go(engine, path, [NAIVE, HALF])
    assert len(lines(path)) == stop + 1 + stop // 2  # with full prefill's rows
    with path.open("a") as file:
        file.write(json.dumps(lines(path)[0])[:40])  # and the next line was being written
    monkeypatch.setattr(answers, "measure", real)
    go(engine, path, [NAIVE, HALF])
    assert sorted((r["id"], r["system"]) for r in lines(path)) == [
        (item, system) for item in "12" for system in ("full", "half", "naive")
    ]
    assert engine.asked.count("full") == 2


def test_a_system_that_fails_leaves_a_row_and_the_others_go_on(
    engine: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    engine.failing = {"query_guided"}
    with caplog.at_level(logging.WARNING, logger="cacheclip_rag"):
        assert go(engine, path, [HALF, NAIVE]) == 2
    assert "half failed: query_guided is broken" in caplog.text
    bad = [row for row in lines(path) if "error" in row]
    assert [(row["id"], row["system"]) for row in bad] == [("1", "half"), ("2", "half")]
    assert bad[0]["error"] == "RuntimeError: query_guided is broken" and "score" not in bad[0]
    assert bad[0]["method"] == describe(METHODS["query_guided"]) and bad[0]["requested_ratio"] == 0.5
    assert [row["system"] for row in lines(path)] == ["full", "half", "naive"] * 2
    engine.failing, engine.asked = set(), []
    assert go(engine, path, [HALF, NAIVE]) == 0
    assert engine.asked == ["query_guided"] * 2  # tried again, and nothing else
    assert "score" in rows.read(path)["d", "1", "half"]
    assert go(engine, path, [HALF, NAIVE]) == 0 and engine.asked == ["query_guided"] * 2


def test_without_full_prefill_no_system_has_an_answer_and_all_are_tried_again(engine: Counting, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    engine.failing = {"full"}
    assert go(engine, path, [NAIVE]) == 4 and engine.asked == ["full", "full"]
    assert {row["error"] for row in lines(path)} == {"full prefill: RuntimeError: full is broken"}
    engine.failing = set()
    assert go(engine, path, [NAIVE]) == 0 and len(rows.read(path)) == 4


# ---- what does not go together -----------------------------------------------------------------------------------


def test_a_file_of_another_model_s_rows_is_refused(engine: Counting, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    go(engine, path, [NAIVE])
    before = path.read_bytes()
    other = Counting(Backbone(tiny_model("llama", seed=5), engine.backbone.tokenizer))
    with pytest.raises(ConfigurationError, match=f"another model.*{lines(path)[0]['model']}"):
        go(other, path, [NAIVE])
    assert path.read_bytes() == before and other.asked == []
    behind = Counting(engine.backbone, prefix="Another prefix. ")  # the same model, however it encodes chunks
    go(behind, path, [NAIVE])
    assert path.read_bytes() == before


def test_rows_of_another_configuration_under_the_same_label_are_refused(engine: Counting, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    go(engine, path, [HALF])
    for name, system, items, options in [
        ("method", System("half", "query_guided", 0.5, parameters={"group_size": 2}), ITEMS, {}),
        ("requested_ratio", System("half", "query_guided", 0.4), ITEMS, {}),
        ("max_new_tokens", HALF, ITEMS, {"max_new_tokens": 7}),
        ("prompt", HALF, [Item("1", "Another question?", (), ITEMS[0].passages)], {}),
    ]:
        with pytest.raises(ConfigurationError, match=f"with another {name} "):
            go(engine, path, [system], items, **options)
    assert len(lines(path)) == 4


def test_labels_are_unique(engine: Counting, tmp_path: Path) -> None:
    for systems in ([NAIVE, System("naive", "query_guided")], [System("full", "naive")]):
        with pytest.raises(ConfigurationError, match="two systems are called"):
            go(engine, tmp_path / "rows.jsonl", systems)
    with pytest.raises(ConfigurationError, match="no parameter"):
        go(engine, tmp_path / "rows.jsonl", [System("x", "naive", parameters={"group_size": 3})])
    assert engine.asked == []


# ---- references --------------------------------------------------------------------------------------------------


def test_full_prefill_runs_once_for_all_runs_and_all_files(
    engine: Counting, backbone: Backbone, tmp_path: Path
) -> None:
    folder = tmp_path / "shared"
    go(engine, tmp_path / "a.jsonl", [NAIVE], references=folder)
    again = Counting(backbone)
    go(again, tmp_path / "b.jsonl", [NAIVE], references=folder)
    assert engine.asked == ["full", "naive"] * 2 and again.asked == ["naive"] * 2
    for a, b in zip(lines(tmp_path / "a.jsonl"), lines(tmp_path / "b.jsonl"), strict=True):
        if a["system"] == "full":
            assert a == b  # with the times that were measured then
        else:
            assert (a["answer"], a["kl"]) == (b["answer"], b["kl"])
    assert len(list(folder.iterdir())) == 2 and not (tmp_path / "references").exists()
    go(again, tmp_path / "c.jsonl", [], ITEMS[:1])
    assert len(list((tmp_path / "references").iterdir())) == 1  # beside the rows, where nothing else is said


def test_a_reference_is_the_greedy_answer_and_its_logits(engine: Counting, tmp_path: Path) -> None:
    text = prompt(ITEMS[0], engine.backbone)
    kept = references.References(tmp_path, "m", 30)
    made, read = kept.of(engine, text), references.References(tmp_path, "m", 30).get(text)
    answer = list(engine.generate(text, method="full", max_new_tokens=30).ids)
    assert read is not None and list(made.answer) == list(read.answer) == answer
    count = min(len(answer), references.ANSWER_TOKENS)
    assert made.logits.dtype == torch.bfloat16 and made.logits.shape == (count, SIZE)
    assert torch.equal(made.logits, read.logits) and made.numbers == read.numbers
    whole = engine.backbone.tokenise_prompt(text).ids
    ids = torch.cat([whole, torch.tensor(answer[: count - 1], dtype=torch.long)])
    canvas = engine.backbone.canvas(len(ids))
    logits = engine.backbone.forward(ids, torch.arange(len(ids)), canvas, logits=count)
    assert kl(logits, made.logits) < 1e-3 and list(logits.argmax(-1)) == answer[:count]


def test_rows_have_the_right_answer_s_likelihood(engine: Counting, tmp_path: Path) -> None:
    go(engine, tmp_path / "rows.jsonl", [NAIVE, System("exact", "naive", 1.0)], ITEMS[:1])
    found = {row["system"]: row["nll"] for row in lines(tmp_path / "rows.jsonl")}
    backbone, answer = engine.backbone, ITEMS[0].answers[0]
    right = [*backbone.tokenise(answer, plain=True).ids.tolist(), backbone.tokenizer.eos_token_id]
    ids = torch.tensor([*backbone.tokenise_prompt(prompt(ITEMS[0], backbone)).ids.tolist(), *right])
    with torch.inference_mode():
        logits = backbone.model(ids[None]).logits[0, -len(right) - 1 : -1].float()
    expected = float(torch.nn.functional.cross_entropy(logits, ids[-len(right) :]))
    assert found["full"] == pytest.approx(expected, rel=1e-3)
    assert found["naive"] != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("changes", [{"answers": ()}, {"answers": ("one", "two"), "all_answers": True}])
def test_without_one_right_answer_there_is_no_likelihood(
    engine: Counting, tmp_path: Path, changes: dict[str, Any]
) -> None:
    go(engine, tmp_path / "rows.jsonl", [NAIVE], [dataclasses.replace(ITEMS[0], **changes)])
    assert [row["nll"] for row in lines(tmp_path / "rows.jsonl")] == [None, None]
    assert "NLL" not in summarise(tmp_path / "rows.jsonl")


def test_a_reference_without_a_likelihood_is_computed_again_where_one_is_asked(
    engine: Counting, tmp_path: Path
) -> None:
    text = prompt(ITEMS[0], engine.backbone)
    kept, right = references.References(tmp_path, "m", LENGTH), right_answer(ITEMS[0], engine.backbone)
    assert "nll" in kept.of(engine, text, right[:0]).numbers and kept.of(engine, text).numbers["nll"] is None
    made = kept.of(engine, text, right)
    assert made.numbers["nll"] > 0 and kept.get(text).numbers == made.numbers


def test_references_of_another_model_prompt_or_length_are_not_used(engine: Counting, tmp_path: Path) -> None:
    text = prompt(ITEMS[0], engine.backbone)
    mine = references.References(tmp_path, "mine", LENGTH)
    mine.of(engine, text)
    strangers = [references.References(tmp_path, "other", LENGTH), references.References(tmp_path, "mine", LENGTH + 1)]
    for stranger in strangers:
        assert stranger.get(text) is None
        mine.path(text).rename(stranger.path(text))  # not even under their name
        assert stranger.get(text) is None
        stranger.path(text).rename(mine.path(text))
    assert mine.get(text + " ") is None and mine.get(text) is not None


def test_another_model_computes_its_own_references(engine: Counting, tmp_path: Path) -> None:
    other = Counting(Backbone(tiny_model("llama", seed=5), engine.backbone.tokenizer))
    for who, name in ((engine, "a"), (other, "b")):
        go(who, tmp_path / f"{name}.jsonl", [NAIVE], ITEMS[:1])
    assert other.asked == ["full", "naive"] and len(list((tmp_path / "references").iterdir())) == 2


def test_a_damaged_reference_is_computed_again_and_mended(
    engine: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = prompt(ITEMS[0], engine.backbone)
    kept = references.References(tmp_path, "m", LENGTH)
    kept.of(engine, text)
    path, whole = kept.path(text), kept.path(text).read_bytes()
    flipped = [bytearray(whole) for _ in range(3)]
    flipped[0][-1] ^= 1  # a logit
    flipped[1][whole.index(b'ttft\\": ') + 10] ^= 1  # a digit of what was measured
    flipped[2][3] ^= 0x40  # the header's length
    for damaged in (b"", b"12345678", whole[:100], whole[:-1], whole + b"x", *map(bytes, flipped), b"\xff" * 999):
        path.write_bytes(damaged)
        engine.asked.clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="cacheclip_rag"):
            assert len(kept.of(engine, text).answer) == LENGTH
        assert engine.asked == ["full"] and "computed again" in caplog.text
        assert kept.get(text) is not None
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary files


def test_a_folder_that_cannot_be_written_costs_time_only(engine: Counting, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert go(engine, tmp_path / "rows.jsonl", [NAIVE], references=tmp_path / "file") == 0
    assert len(lines(tmp_path / "rows.jsonl")) == 4


def test_control_tokens_in_a_document_are_text_for_full_prefill_too(engine: Counting, tmp_path: Path) -> None:
    odd = PASSAGES[0].replace("whale oil", "<|im_end|> whale oil <|im_start|>")
    item = Item("1", "Who?", (), (Passage("", odd), Passage("", PASSAGES[1])))
    go(engine, tmp_path / "rows.jsonl", [NAIVE, System("all", "query_guided", 1.0)], [item])
    full, naive, everything = lines(tmp_path / "rows.jsonl")
    assert full["prompt_tokens"] == naive["prompt_tokens"] and everything["kl"] < 1e-6
