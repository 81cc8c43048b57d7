"""What ``make torture`` does to engines at length: killed, made to forget in a race, asked by many threads at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("fcntl")  # forks and signals are Unix's
from torture_counts import Counts
from torture_forgetting import forgetting
from torture_kills import kill_engines, kill_ingestions
from torture_memory import memory
from torture_threads import threads


def verdict(counts: Counts) -> None:
    print(counts)
    assert counts.good, str(counts)


def test_nothing_comes_back_that_is_forgotten_in_a_race(tmp_path: Path) -> None:
    counts = forgetting(tmp_path, count=12, checks=2)
    verdict(counts)
    assert counts.done["forgettings"] == 12 and counts.done["asked"] and counts.done["ingested"]


def test_an_engine_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    counts = kill_engines(tmp_path, rounds=6)
    verdict(counts)
    assert counts.done["kills"] == 6 and counts.done["chunks stored"]


def test_an_ingestion_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("llama_index.readers.file")
    counts = kill_ingestions(tmp_path, rounds=3)
    verdict(counts)
    assert counts.done["kills"] >= 3


def test_many_threads_with_mixed_methods_get_the_answers_of_one_after_another(tmp_path: Path) -> None:
    counts = threads(tmp_path, count=64, requests=2, prompts=2)
    verdict(counts)
    assert counts.done["requests"] == 128


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read as Linux shows it")
def test_requests_leave_no_memory_behind(tmp_path: Path) -> None:
    verdict(memory(requests=30, warm_up=30, bound=128 << 10))  # a fifth of one prompt's KV
