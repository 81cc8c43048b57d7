"""Choosing and reporting stay apart: no question that a choice was made on is one that results are reported on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cacheclip_rag import ConfigurationError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from halves import REPORTING, SETS, half  # noqa: E402
from report import in_order, orders  # noqa: E402

ALL = frozenset().union(*REPORTING.values())
FILES = sorted((BENCHMARKS / "results").glob("*.jsonl"))


def asked(file: Path) -> set[str]:
    return {row["id"] for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()) if "id" in row}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_rows_are_of_one_half_only(file: Path) -> None:
    mine = asked(file)
    assert mine <= ALL if file.stem.startswith("report-") else not mine & ALL


def test_the_reporting_half_has_the_promised_numbers() -> None:
    assert {name: len(ids) for name, ids in REPORTING.items()} == {
        "hotpotqa_distractor": 28,
        "2wikimultihopqa": 29,
        "musique_cacheblend": 30,
        "nq_multidoc": 90,
        "xquad_fusion": 120,
    }
    assert len(ALL) == sum(map(len, REPORTING.values())) and set(SETS) == set(REPORTING)


def write(folder: Path, ids: list[str], passages: int = 1) -> Path:
    (folder / "nq_multidoc").mkdir()
    texts = [{"title": "", "text": f"Lamp {number} was lit in 1874."} for number in range(passages)]
    records = [{"id": id, "question": "When?", "answers": ["1874"], "passages": texts} for id in ids]
    (folder / "nq_multidoc" / "qa.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    return folder


def test_each_half_is_the_rest_of_the_other(tmp_path: Path) -> None:
    known = sorted(REPORTING["nq_multidoc"])
    folder = write(tmp_path, [*known, "one", "two"])
    (kept,), (rest,) = (half(folder, which, ["nq_multidoc"]) for which in ("reporting", "choosing"))
    assert kept.ids == REPORTING["nq_multidoc"] and rest.ids == {"one", "two"}
    # Passages of the other half's questions stay in the knowledge base, as they would be in a user's.
    assert len(kept.all()) == len(rest.all()) == len(known) + 2


def test_a_file_that_lacks_questions_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, sorted(REPORTING["nq_multidoc"])[1:])
    with pytest.raises(ConfigurationError, match="lacks 1 questions of the reporting half"):
        half(folder, "reporting", ["nq_multidoc"])


def test_orders_are_of_the_same_questions_and_passages(tmp_path: Path) -> None:
    (source,) = half(
        write(tmp_path, [*sorted(REPORTING["nq_multidoc"]), "one"], passages=8), "choosing", ["nq_multidoc"]
    )
    plain, *moved = ([*each.all()] for each in (source, *(in_order(source, seed) for seed in (1, 2, 1))))
    assert [item.id for item in plain] == [item.id for item in moved[0]]
    assert moved[0] == moved[2] != moved[1] and moved[0] != plain
    assert all(set(a.passages) == set(b.passages) for a, b in zip(plain, moved[0], strict=True))
    assert in_order(source, 2).name == "nq_multidoc_order2" and in_order(source, 2).ids == source.ids


def test_what_another_order_changes() -> None:
    def row(id: str, order: int, answer: str, score: float) -> dict[str, object]:
        return {
            "dataset": f"d_order{order}",
            "id": id,
            "system": "a",
            "answer": answer,
            "score": score,
            "kl": score / 2,
        }

    same = [row("1", order, "the Bath", 1.0) for order in (1, 2, 3)]
    other = [row("2", 1, "Bath", 1.0), row("2", 2, "Rome", 0.0), row("2", 3, "Bath", 1.0)]
    unfinished = [row("3", 1, "Oslo", 0.0)]
    assert orders([*same, *other, *unfinished]).splitlines()[-1] == "| a | 2 | 50% | 0.500 | 0.250 |"
