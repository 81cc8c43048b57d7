"""Reading data, scoring answers, resuming runs, and the tables."""

from __future__ import annotations

import json
import logging
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cacheclip_rag.chunks import Namespace
from cacheclip_rag.evaluation import Item, Passage, System, exact_match, f1, kl, read, recall, run, spread, summarise
from cacheclip_rag.evaluation import runner as runner_module
from cacheclip_rag.evaluation.metrics import normalise
from cacheclip_rag.report import Report

# ---- reading -----------------------------------------------------------------------------------------------------


def record(**changes: Any) -> dict[str, Any]:
    passages = [{"title": "Otto", "text": "Otto is a harbour."}, {"text": " untitled "}]
    return {"id": 7, "question": "Who?", "answers": ["Otto"], "passages": passages} | changes


def lines(*records: Any, ascii: bool = True) -> str:
    return "\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=ascii) for r in records) + "\n"


def test_items_are_read(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text(lines(record(meta={"task": "t"}), "", record(id="b", passages=[])), encoding="utf-8")
    one, two = read(path)
    passages = (Passage("Otto", "Otto is a harbour."), Passage("", " untitled "))
    assert one == Item("7", "Who?", ("Otto",), passages, False, {"task": "t"})
    assert [passage.chunk for passage in one.passages] == ["Otto\nOtto is a harbour.", "untitled"]
    assert (two.id, two.passages, two.meta) == ("b", (), {})
    assert read(str(path)) == [one, two]


MALFORMED = {
    "no JSON": "{",
    "cut short": json.dumps(record())[:-20],
    "no object": "[1]",
    "null": "null",
    "a number": "5",
    "no id": {k: v for k, v in record().items() if k != "id"},
    "no question": {k: v for k, v in record().items() if k != "question"},
    "no answers": {k: v for k, v in record().items() if k != "answers"},
    "no passages": {k: v for k, v in record().items() if k != "passages"},
    "answers are one string": record(answers="Otto"),
    "answers are null": record(answers=None),
    "an answer is a number": record(answers=[1847]),
    "question is null": record(question=None),
    "passages are strings": record(passages=["Otto is a harbour."]),
    "passage without text": record(passages=[{"title": "Otto"}]),
    "passage with null text": record(passages=[{"title": "Otto", "text": None}]),
    "meta is a list": record(meta=["all_answers_required"]),
    "deeply nested": "[" * 100_000,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_line_is_reported_with_its_number_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text(lines(record(id="before"), MALFORMED[name], record(id="after")), encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="cacheclip_rag"):
        items = read(path)
    assert [item.id for item in items] == ["before", "after"]
    assert len(caplog.records) == 1 and "line 2" in caplog.text


def test_a_line_that_is_no_utf_8_is_a_malformed_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "qa.jsonl"
    latin = json.dumps(record(id="latin", question="Où?"), ensure_ascii=False).encode("latin-1")
    path.write_bytes(lines(record(id="before")).encode() + latin + b"\n" + lines(record(id="after")).encode())
    with caplog.at_level(logging.WARNING, logger="cacheclip_rag"):
        items = read(path)
    assert [item.id for item in items] == ["before", "after"] and "line 2" in caplog.text


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "🦊", "\u00a0"])
def test_a_line_ends_at_a_newline_only(tmp_path: Path, character: str) -> None:
    # Text from the web holds line and paragraph separators, and JSON need not escape them.
    path = tmp_path / "qa.jsonl"
    odd = record(passages=[{"title": "", "text": f"one{character}two"}])
    path.write_text(lines(odd, ascii=False), encoding="utf-8", newline="")
    assert [item.passages[0].text for item in read(path)] == [f"one{character}two"]


def test_windows_line_ends_will_do(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_bytes(lines(record(), record(id=8)).replace("\n", "\r\n").encode())
    assert [item.id for item in read(path)] == ["7", "8"]


@pytest.mark.parametrize("meta,expected", [({}, False), (True, True), (False, False)])
def test_all_answers_are_required_where_the_data_say_so(tmp_path: Path, meta: Any, expected: bool) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text(lines(record(meta=meta if meta == {} else {"all_answers_required": meta})), encoding="utf-8")
    assert read(path)[0].all_answers is expected


@pytest.mark.parametrize("count", [0, 1, 3, 7, 10, 99])
def test_a_spread_covers_the_file_evenly(count: int) -> None:
    items = [Item(str(i), "", (), ()) for i in range(10)]
    chosen = [int(item.id) for item in spread(items, count)]
    assert len(chosen) == min(count, 10) and chosen == sorted(set(chosen))
    if 1 < count < 10:
        steps = {b - a for a, b in pairwise(chosen)}
        assert max(steps) - min(steps) <= 1 and chosen[0] == 0 and chosen[-1] >= 10 - 10 / count - 1


# ---- metrics -----------------------------------------------------------------------------------------------------


def test_the_normal_form() -> None:
    assert normalise("  The U.S.  president, an\tOld   man's\nhat! ") == "us president old mans hat"
    assert normalise("Anna, Theo and Ada") == "anna theo and ada"  # articles only as whole words
    assert normalise("The a an.") == ""


@pytest.mark.parametrize(
    "prediction,answers,expected",
    [
        ("Paris", ["Paris"], 1.0),
        ("the Paris!", ["paris"], 1.0),
        ("London", ["Paris"], 0.0),
        ("", ["Paris"], 0.0),
        ("Paris", [], 0.0),
        ("in Paris, France", ["Paris"], 2 * 1 / (3 + 1)),
        ("Paris", ["Paris France"], 2 * 1 / (1 + 2)),
        ("Paris", ["London", "Paris France", "Paris"], 1.0),
        ("b b b", ["b b c c"], 2 * 2 / (3 + 4)),  # repeated words count as often as in both
        ("one two", ["two one"], 1.0),
    ],
)
def test_f1(prediction: str, answers: list[str], expected: float) -> None:
    assert f1(prediction, answers) == pytest.approx(expected)


def test_exact_match() -> None:
    assert exact_match("The  Eiffel tower.", ["x", "eiffel Tower"]) == 1.0
    assert exact_match("Eiffel tower in Paris", ["Eiffel tower"]) == 0.0
    assert exact_match("anything", []) == 0.0


def test_recall() -> None:
    assert recall("It is 12, then ABC.", ["12", "abc"]) == 1.0
    assert recall("It is 12.", ["12", "abc", "13", "it"]) == 0.5
    assert recall("", ["12"]) == 0.0
    assert recall("x", []) == 0.0


def logits(*probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities).log() + 5.0  # a constant does not matter to a softmax


def test_kl_of_known_distributions() -> None:
    p, q = logits([0.5, 0.5], [0.9, 0.1]), logits([0.25, 0.75], [0.9, 0.1])
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    backward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl(p, q) == pytest.approx(forward / 2, rel=1e-4)  # the mean over two positions
    assert kl(q, p) == pytest.approx(backward / 2, rel=1e-4)
    assert forward != pytest.approx(backward, rel=1e-2)


def test_kl_is_zero_for_equal_and_positive_for_different_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(5, 1000, generator=generator) * 4
    assert kl(p, p) == 0.0
    assert kl(p, p + 3.0) == pytest.approx(0.0, abs=1e-5)
    for noise in (0.01, 1.0):
        assert kl(p, p + noise * torch.randn(5, 1000, generator=generator)) > 0
    assert kl(p.bfloat16(), p.bfloat16()) == 0.0


# ---- the runner --------------------------------------------------------------------------------------------------

MODEL = Namespace({"model": "m"})
IDENTITY = MODEL.digest[:16]


def row(**changes: Any) -> dict[str, Any]:
    numbers = {"score": 1.0, "em": 1.0, "agree": 1.0, "kl": 0.0, "ratio": 0.0}
    return {"dataset": "d", "model": IDENTITY, "id": "1", "system": "full", "answer": "x", **numbers} | changes


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def engine() -> Any:
    """An engine that must not be asked for anything but its identity."""
    return SimpleNamespace(library=SimpleNamespace(namespace=MODEL))


ITEM = Item("1", "Who?", ("Otto",), (Passage("", "text"),))


def test_rows_of_an_earlier_run_are_not_repeated(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row(), row(system="clip"))
    before = path.read_bytes()
    run(engine(), [ITEM], [System("clip", "cacheclip")], path, dataset="d")
    assert path.read_bytes() == before
    for other in ({"dataset": "e"}, {"items": [Item("2", "", (), ())]}, {"systems": [System("new", "cacheclip")]}):
        arguments: dict[str, Any] = {"items": [ITEM], "systems": [System("clip", "x")], "dataset": "d"} | other
        with pytest.raises(AttributeError):  # this is to do, so the engine is asked
            run(engine(), path=path, **arguments)


def test_a_file_of_another_model_s_rows_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row(), row(model="0123456789abcdef", id="2"))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"another model.*0123456789abcdef"):
        run(engine(), [ITEM], [System("clip", "cacheclip")], path, dataset="d")
    assert path.read_bytes() == before


def test_a_row_that_a_kill_cut_short_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row())
    with path.open("a") as file:
        file.write(json.dumps(row(id="2"))[:30])
    with pytest.raises(ValueError, match="line 2"):
        run(engine(), [ITEM], [System("clip", "cacheclip")], path, dataset="d")


def test_a_run_that_has_nothing_to_do_makes_its_folder(tmp_path: Path) -> None:
    run(engine(), [], [System("clip", "cacheclip")], tmp_path / "a" / "rows.jsonl", dataset="d")
    assert (tmp_path / "a" / "rows.jsonl").read_text() == ""


def made(item: Item, text: str, full: str) -> dict[str, Any]:
    report = Report("m", 0.2, prompt_tokens=100, reused=60, recomputed=20, fresh=20)
    prefill: Any = SimpleNamespace(report=report)
    return runner_module._row(item, "s", prefill, text, full, 0.5)


def test_a_row_scores_the_answer_and_its_agreement_with_full_prefill() -> None:
    plain = made(Item("1", "Who?", ("Otto", "Bo Otto"), ()), "Otto", "Otto Bo")
    assert (plain["score"], plain["em"], plain["kl"]) == (1.0, 1.0, 0.5)
    assert plain["agree"] == pytest.approx(2 / 3)
    assert (plain["ratio"], plain["reused"], plain["computed"], plain["prompt_tokens"]) == (0.25, 60, 40, 100)
    every = made(Item("1", "Who?", ("Otto", "Bo"), (), all_answers=True), "Otto", "Otto")
    assert every["score"] == 0.5 and every["agree"] == 1.0
    json.dumps(plain)


@pytest.mark.parametrize("answer", ["", "A", "The", "?", "Otto"])
def test_equal_answers_agree(answer: str) -> None:
    assert made(ITEM, answer, answer)["agree"] == 1.0  # "A" is what multiple choice is answered with


@pytest.mark.parametrize("pair", [("", "Otto"), ("Otto", ""), ("A", "B")])
def test_different_answers_do_not_agree(pair: tuple[str, str]) -> None:
    assert made(ITEM, *pair)["agree"] == 0.0


# ---- tables ------------------------------------------------------------------------------------------------------


def test_the_table(tmp_path: Path) -> None:
    rows = [
        row(id="1", score=1.0),
        row(id="2", score=0.0),
        row(id="1", system="clip", score=0.5, agree=0.25, kl=0.2, ratio=0.1),
        row(id="2", system="clip", score=1.0, agree=0.75, kl=0.4, ratio=0.3),
        row(id="9", system="clip", score=1.0, agree=1.0, kl=9.0, ratio=1.0),  # full prefill has no such item
        row(id="1", dataset="e", score=0.0),
        row(id="1", dataset="e", system="none", score=1.0, agree=0.0, kl=1.5),
    ]
    table = summarise(write(tmp_path / "rows.jsonl", *rows))
    first, second = table.split("### e")
    assert first.startswith("### d\n\n| system | items | score | adjusted | agree | KL | ratio |\n|---")
    assert "| full | 2 | 0.500 | 1.000 (1) | 1.000 | 0.000 | 0.000 |" in first
    assert "| clip | 2 | 0.750 | 0.500 (1) | 0.500 | 0.300 | 0.200 |" in first
    assert "| none | 1 | 1.000 | – (0) | 0.000 | 1.500 | 0.000 |" in second
    assert "clip" not in second and table.endswith("|\n")
