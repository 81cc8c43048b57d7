"""The file of rows, and what the tables make of it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cacheclip_eval import compare, comparison, rows, summarise, summary

from cacheclip_rag.errors import ConfigurationError


def row(**changes: Any) -> dict[str, Any]:
    numbers = {"score": 1.0, "em": 1.0, "agree": 1.0, "kl": 0.0, "ratio": 0.0}
    return {"dataset": "d", "model": "m", "id": "1", "system": "full", "answer": "x", **numbers} | changes


def failed(**changes: Any) -> dict[str, Any]:
    return {"dataset": "d", "model": "m", "id": "1", "system": "full", "error": "RuntimeError: boom"} | changes


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def records(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["dataset"], r["system"]): r for r in summary(path)}


# ---- the file ----------------------------------------------------------------------------------------------------


def test_the_newest_row_wins_in_the_place_of_the_oldest(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row(), failed(system="a"), row(system="b"), row(system="a", score=0.5))
    found = rows.read(path)
    assert [key[2] for key in found] == ["full", "a", "b"]
    assert found["d", "1", "a"]["score"] == 0.5 and "error" not in found["d", "1", "a"]


def test_a_last_line_that_a_kill_cut_short_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "rows.jsonl", row())
    whole = path.read_bytes()
    line = json.dumps(row(id="2", answer="Où?"), ensure_ascii=False).encode()
    for cut in (1, 30, line.index("ù".encode()) + 1, len(line) - 1):
        path.write_bytes(whole + line[:cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="cacheclip_rag"):
            assert len(rows.read(path)) == 1  # looking changes nothing
        assert path.read_bytes() == whole + line[:cut] and "cut short" in caplog.text
        assert len(rows.read(path, repair=True)) == 1
        assert path.read_bytes() == whole


def test_a_last_row_that_only_lacks_its_newline_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row(), row(id="2"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert len(rows.read(path, repair=True)) == 2 and path.read_bytes() == whole
    assert len(rows.read(path, repair=True)) == 2 and path.read_bytes() == whole


@pytest.mark.parametrize(
    "bad", ["{", "[]", "5", "null", '{"id": "1"}', json.dumps(row(id=7)), json.dumps(row())[:-9], "[" * 100_000]
)
def test_any_other_line_that_is_no_row_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row())}\n\n{bad}\n{json.dumps(row(id='2'))}\n")
    before = path.read_bytes()
    for repair in (False, True):
        with pytest.raises(ConfigurationError, match="line 3"):
            rows.read(path, repair=repair)
    assert path.read_bytes() == before


# ---- the summary -------------------------------------------------------------------------------------------------


def test_the_means_are_over_the_items_that_full_prefill_answered(tmp_path: Path) -> None:
    found = records(
        write(
            tmp_path / "rows.jsonl",
            row(id="1", score=1.0),
            row(id="2", score=0.0),
            row(id="1", system="clip", score=0.5, agree=0.25, kl=0.2, ratio=0.1),
            row(id="2", system="clip", score=1.0, agree=0.75, kl=0.4, ratio=0.3),
            row(id="9", system="clip", score=1.0, agree=1.0, kl=9.0, ratio=1.0),  # full prefill has no such item
            row(id="1", dataset="e", score=0.0),
            row(id="1", dataset="e", system="none", score=1.0, agree=0.0, kl=1.5, ratio=None),
        )
    )
    clip, none = found["d", "clip"], found["e", "none"]
    assert (clip["items"], clip["score"], clip["agree"]) == (2, 0.75, 0.5)
    assert clip["kl"] == pytest.approx(0.3) and clip["ratio"] == pytest.approx(0.2)
    assert (clip["adjusted"], clip["solved"]) == (0.5, 1)  # item 2 is one that full prefill does not solve
    assert clip["score_interval"] == [0.5, 1.0] and clip["adjusted_interval"] is None
    assert (none["adjusted"], none["solved"], none["ratio"], none["ttft"]) == (None, 0, None, None)
    assert ("e", "clip") not in found
    json.dumps(list(found.values()))


def test_items_that_failed_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        *(row(id=i) for i in "123"),
        failed(id="4"),
        row(id="1", system="clip", score=0.25),
        failed(id="2", system="clip"),
        failed(id="3", system="clip"),
        row(id="3", system="clip", score=0.75),  # tried again
        failed(id="4", system="clip"),
        failed(id="1", system="worst"),
    )
    found = records(path)
    assert (found["d", "clip"]["items"], found["d", "clip"]["failed"], found["d", "clip"]["score"]) == (2, 2, 0.5)
    assert (found["d", "full"]["items"], found["d", "full"]["failed"]) == (3, 1)
    assert (found["d", "worst"]["items"], found["d", "worst"]["score"]) == (0, None)
    assert "| clip | 2 (2 failed) | 0.500 [0.25, 0.75] |" in summarise(path)
    assert "| worst | 0 (1 failed) | – | – (0) | – | – | – | – | – | – | – |" in summarise(path)


def test_the_normalised_score_is_over_the_items_of_all_three(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        *(row(id=i, score=s) for i, s in (("1", 1.0), ("2", 0.5), ("3", 0.0))),
        *(row(id=i, system="naive", score=s) for i, s in (("1", 0.5), ("2", 0.25))),
        *(row(id=i, system="clip", score=s) for i, s in (("1", 0.8), ("2", 0.5), ("3", 1.0))),
        row(id="3", system="apart", score=1.0),
        row(dataset="e", score=0.5),
        row(dataset="e", system="naive", score=0.5),
        row(dataset="e", system="clip", score=0.7),
        row(dataset="f", score=0.4),
        row(dataset="f", system="naive", score=0.5),
        row(dataset="f", system="clip", score=0.2),
    )
    found = records(path)
    # Over items 1 and 2: clip 0.65, naive 0.375, full 0.75.
    assert found["d", "clip"]["normalised"] == pytest.approx((0.65 - 0.375) / (0.75 - 0.375) * 100)
    assert (found["d", "naive"]["normalised"], found["d", "full"]["normalised"]) == (0.0, 100.0)
    # No full prefill on its items; plain reuse loses nothing, or is better.
    assert [found[key]["normalised"] for key in (("d", "apart"), ("e", "clip"), ("f", "clip"))] == [None] * 3


def test_times_are_relative_to_full_prefill_item_by_item(tmp_path: Path) -> None:
    full = [row(id=i, ttft=t) for i, t in (("1", 10.0), ("2", 1.0), ("3", 4.0))]
    clip = [row(id=i, system="clip", ttft=t) for i, t in (("1", 2.0), ("2", 0.9), ("3", 1.0))]
    # Ratios 0.2, 0.9, 0.25: the median is 0.25, where the mean is 0.45 and the ratio of means 0.26.
    assert records(write(tmp_path / "rows.jsonl", *full, *clip))["d", "clip"]["ttft"] == pytest.approx(0.25)


def test_bytes_per_token_count_the_auxiliary_model_s(tmp_path: Path) -> None:
    sizes = [
        dict(stored_bytes=600, stored_tokens=2, auxiliary_bytes=60),
        dict(stored_bytes=900, stored_tokens=8, auxiliary_bytes=0),
    ]
    unknown: dict[str, Any] = dict(stored_bytes=None, stored_tokens=None, auxiliary_bytes=None)
    path = write(
        tmp_path / "rows.jsonl",
        *(row(id=i) | dict(stored_bytes=0, stored_tokens=0, auxiliary_bytes=0) for i in "123"),
        *(row(id=i, system="clip", **size) for i, size in zip("123", [*sizes, unknown], strict=True)),
    )
    assert records(path)["d", "clip"]["bytes_per_token"] == pytest.approx(1560 / 10)
    assert records(path)["d", "full"]["bytes_per_token"] is None


def test_the_table(tmp_path: Path) -> None:
    extra = dict(stored_bytes=10_000, stored_tokens=10, auxiliary_bytes=0)
    path = write(
        tmp_path / "rows.jsonl",
        row(id="1", score=1.0, ttft=2.0),
        row(id="2", score=0.0, ttft=2.0),
        row(id="1", system="naive", score=0.5, ttft=0.2),
        row(id="2", system="naive", score=0.0, ttft=0.2),
        row(id="1", system="clip", score=0.75, agree=0.25, kl=0.2, ratio=0.1, ttft=0.5, **extra),
        row(
            id="2", system="clip", score=0.0, agree=0.75, kl=0.4, ratio=0.3, ttft=0.7, fallbacks=["chunk gone"], **extra
        ),
        row(id="1", dataset="e"),
    )
    text = summarise(path)
    first, second = text.split("### e")
    head = "| system | items | score | adjusted | normalised | agree | KL | median | ratio | TTFT | bytes/token |"
    assert first.startswith(f"### d\n\n{head}\n{'|---' * 11}|\n| full | 2 |")
    clip = (
        "0.375 [0.00, 0.75] | 0.750 (1) | 50 | 0.500 [0.25, 0.75] | 0.300 [0.20, 0.40] | 0.300 | 0.200 | 0.30 | 1,000 |"
    )
    assert f"| clip | 2 | {clip}" in first
    assert "given up, wholly or for a chunk: clip on 1." in first and "given up" not in second
    assert "clip" not in second and text.endswith("|\n") and summarise(path) == text


def test_rows_of_older_versions_still_make_tables(tmp_path: Path) -> None:
    old = [row(), row(system="clip", score=0.5, ratio=0.2)]
    assert "| clip | 1 | 0.500 | 0.500 (1) | – | 1.000 | 0.000 | 0.000 | 0.200 | – | – |" in summarise(
        write(tmp_path / "rows.jsonl", *old)
    )


# ---- comparing ---------------------------------------------------------------------------------------------------


def test_a_difference_is_of_the_same_items_and_named_only_where_there_is_one(tmp_path: Path) -> None:
    ids = [str(i) for i in range(12)]
    hard = [i / 12 for i in range(12)]
    path = write(
        tmp_path / "rows.jsonl",
        *(row(id=i, score=float(i != "0")) for i in ids),
        *(row(id=i, system="base", score=h, kl=0.3, agree=0.5) for i, h in zip(ids, hard, strict=True)),
        *(
            row(id=i, system="clip", score=h + (0.1 if int(i) % 2 else -0.1), kl=0.1 + h / 10, agree=0.75)
            for i, h in zip(ids, hard, strict=True)
        ),
        row(id="99", system="clip", score=0.0, kl=50.0),  # the baseline has no such item
        failed(id="0", system="base"),
    )
    (full, clip) = comparison(path, "base")
    assert (full["system"], clip["system"], clip["items"], clip["adjusted"]["items"]) == ("full", "clip", 11, 11)
    assert not clip["score"]["found"] and clip["score"]["interval"][0] < 0 < clip["score"]["interval"][1]
    assert clip["kl"]["found"] and clip["kl"]["difference"] == pytest.approx(
        sum(0.1 + h / 10 for h in hard[1:]) / 11 - 0.3
    )
    assert clip["agree"] == {"difference": 0.25, "interval": [0.25, 0.25], "items": 11, "found": True}
    text = compare(path, "base")
    assert text.startswith(
        "### d, minus base\n\n| system | items | score | adjusted | agree | KL |\n|---|---|---|---|---|---|\n"
    )
    line = next(line for line in text.splitlines() if line.startswith("| clip"))
    assert line.startswith("| clip | 11 | none [-0.0") and "| +0.250 [+0.250, +0.250] | -0.1" in line
    assert compare(path, "base") == text


def test_a_baseline_without_common_items_and_an_unknown_one(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row(), row(id="2", system="clip"), row(dataset="e", system="clip"))
    assert "| full | 0 | – | – | – | – |" in compare(path, "clip")
    with pytest.raises(ConfigurationError, match="full, clip"):
        compare(path, "clop")


def test_the_module_prints_the_tables(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row(), row(system="clip", score=0.5))
    command = [sys.executable, "-m", "cacheclip_eval"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, summarise(path))
    done = subprocess.run([*command, str(tmp_path / "absent.jsonl")], capture_output=True, text=True)
    assert done.returncode == 1 and "usage" in done.stderr and "Traceback" not in done.stderr
