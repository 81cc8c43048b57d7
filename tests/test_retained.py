"""What systems keep of full prefill, over several sets: weights, bounds, changed answers, and pairs."""

from __future__ import annotations

from typing import Any

import pytest
from cacheclip_eval.retained import retained, table


def row(dataset: str, id: int, system: str, answer: str, score: float, kl: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"dataset": dataset, "id": str(id), "system": system, "answer": answer, "score": score, "kl": kl, **more}


def rows(dataset: str, count: int, score: float, kl: float) -> list[dict[str, Any]]:
    """Full prefill scores 1 everywhere; "a" scores and diverges as given."""
    return [
        row(dataset, id, system, system, value, distance, ratio=0.15)
        for id in range(count)
        for system, value, distance in (("full", 1.0, 0.0), ("a", score, kl))
    ]


def of(records: list[dict[str, Any]], system: str) -> dict[str, Any]:
    return next(record for record in records if record["system"] == system)


def test_a_large_set_counts_no_more_than_a_small_one() -> None:
    found = of(retained([*rows("small", 2, 0.0, 1.0), *rows("large", 20, 1.0, 0.0)]), "a")
    assert found["kept"] == found["kl"] == 0.5 and found["items"] == {"small": 2, "large": 20}
    # Bootstrapped inside each set, where all items are alike: no resample mixes the sets in another proportion.
    assert found["kept_bound"] == 0.5 and found["kl_interval"] == (0.5, 0.5)


def test_the_bound_lies_below_the_share_and_an_interval_around_the_mean() -> None:
    mixed = [*rows("d", 10, 0.0, 1.0), *[r | {"id": r["id"] + "x"} for r in rows("d", 30, 1.0, 0.0)]]
    found = of(retained(mixed), "a")
    low, high = found["kl_interval"]
    assert found["kept"] == 0.75 and low < 0.25 < high
    assert 0.6 < found["kept_bound"] < 0.75
    assert high > 1 - found["kept_bound"]  # two-sided at 95 % reaches further than one-sided at 90 %


def test_changed_answers_are_split_into_better_and_worse() -> None:
    answers = [("the Bath", 1.0), ("Maine", 1.0), ("Rome", 0.0), ("Oslo", 0.5)]
    full = [row("d", id, "full", "Bath", 0.5) for id in range(4)]
    found = of(retained([*full, *(row("d", id, "a", *answer) for id, answer in enumerate(answers))]), "a")
    # An article is no change, whatever the scores say; one of the three others is neither better nor worse.
    assert (found["changed"], found["better"], found["worse"]) == (0.75, 0.25, 0.25)


def test_differences_are_paired_and_a_failed_answer_drops_its_pair() -> None:
    base = [row("d", id, "base", "x", 1.0, float(id)) for id in range(8)]
    mine = [row("d", id, "a", "x", 1.0, id + 0.5) for id in range(7)]
    mine.append({"dataset": "d", "id": "7", "system": "a", "error": "broken"})
    records = retained([*(row("d", id, "full", "x", 1.0) for id in range(8)), *base, *mine], "base")
    found = of(records, "a")
    assert found["items"] == {"d": 7} and found["kl_difference"] == 0.5
    assert found["kl_difference_interval"] == (0.5, 0.5) and found["kl_p95"] == pytest.approx(6.2)
    assert "+0.500 [+0.500, +0.500] |" in table(records, "base") and "undecided" not in table([found], "base")
    assert "+0.000 [+0.000, +0.000], undecided" in table(records, "base")  # the baseline against itself
