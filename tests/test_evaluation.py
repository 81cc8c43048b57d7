"""Reading data and scoring answers."""

from __future__ import annotations

import codecs
import json
import logging
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cacheclip_eval import Item, Passage, bootstrap, exact_match, f1, normalised_f1, paired, read, recall, spread
from cacheclip_eval.metrics import normalise

from cacheclip_rag.verification import kl

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


def test_a_byte_order_mark_is_no_part_of_the_first_item(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + lines(record(), record(id=8)).encode())
    assert [item.id for item in read(path)] == ["7", "8"]


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
    assert recall("12", ["12", ""]) == 0.5 and recall("12", [" "]) == 0.0  # what is in any text is not found in it


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


def test_normalised_f1_by_hand() -> None:
    # FusionRAG eq. 11: of the 0.4 that lie between plain reuse and full prefill, 0.3 came back.
    assert normalised_f1(0.5, naive=0.2, full=0.6) == pytest.approx(75.0)
    assert normalised_f1(0.2, naive=0.2, full=0.6) == 0.0 and normalised_f1(0.6, naive=0.2, full=0.6) == 100.0
    assert normalised_f1(0.7, naive=0.2, full=0.6) == pytest.approx(125.0)
    assert normalised_f1(0.1, naive=0.2, full=0.6) == pytest.approx(-25.0)
    assert normalised_f1(0.5, naive=0.6, full=0.6) is None


def test_f1_is_rouge_1_over_normal_forms() -> None:
    # Unigrams "cat sat on mat" and "cat lay on red mat": three in common, precision 3/4, recall 3/5.
    precision, recall_ = 3 / 4, 3 / 5
    rouge = 2 * precision * recall_ / (precision + recall_)
    assert f1("The cat sat on the mat.", ["a cat lay on the red mat"]) == pytest.approx(rouge)


def test_the_bootstrap_interval_of_a_known_distribution() -> None:
    # The mean of n normal values has standard error s / sqrt(n), and 95 % of a normal lie within 1.96 of those.
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = bootstrap(values.tolist())
    error = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - error, abs=0.02) and high == pytest.approx(
        values.mean() + error, abs=0.02
    )
    narrow = bootstrap(values.tolist(), level=0.5)
    assert low < narrow[0] < values.mean() < narrow[1] < high
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 * values.std() / math.sqrt(400), abs=0.02)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(300):
        low, high = bootstrap(generator.binomial(1, 0.4, size=60).tolist(), resamples=500)
        hits += low <= 0.4 <= high
    assert 0.89 <= hits / 300 <= 0.99


def test_the_interval_is_the_same_every_time_and_however_many_items_there_are() -> None:
    values = np.random.default_rng(4).random(12).tolist()
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)
    assert bootstrap([0.3] * 9) == (pytest.approx(0.3), pytest.approx(0.3))
    many = np.random.default_rng(0).random(30_000).tolist()  # more than are drawn at a time
    low, high = bootstrap(many, resamples=100)
    assert low < np.mean(many) < high and high - low < 0.01
    assert all(math.isnan(bound) for values in ([], [1.0]) for bound in bootstrap(values))


def test_pairs_show_what_the_spread_between_items_hides() -> None:
    generator = np.random.default_rng(3)
    hard = generator.random(50)
    noise = generator.normal(0, 0.02, size=50)
    better = paired((hard + 0.05 + noise).tolist(), hard.tolist())
    assert better.found and better.low < 0.05 < better.high and better.items == 50
    worse = paired(hard.tolist(), (hard + 0.05 + noise).tolist())
    assert worse.found and worse.difference == pytest.approx(-better.difference)
    assert not paired((hard + noise).tolist(), hard.tolist()).found
    assert not paired((hard + 0.05).tolist(), generator.permutation(hard).tolist()).found  # the same values, unpaired


def test_a_few_items_show_no_difference() -> None:
    assert not paired([1.0] * 5, [0.0] * 5).found  # five of a kind are chance once in sixteen times
    assert paired([1.0] * 6, [0.0] * 6).found
    assert not paired([1.0], [0.0]).found
    for a, b in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="pairs"):
            paired(a, b)
