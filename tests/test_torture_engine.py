"""What ``make torture`` does to engines at length: killed, made to forget in a race, asked by many threads at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fcntl")  # forks and signals are Unix's
from torture_counts import Counts
from torture_memory import memory
from torture_threads import threads


def verdict(counts: Counts) -> None:
    print(counts)
    assert counts.good, str(counts)


@pytest.mark.parametrize("what", ["forgetting", "engines killed", "ingestions killed"])
def test_in_a_process_of_its_own(what: str) -> None:
    """They fork, and Chroma's threads, which other tests have started in this process, do not survive that."""
    if what.startswith("ingestions"):
        pytest.importorskip("llama_index.readers.file")
    script = Path(__file__).with_name("torture_engine.py")
    counts = ["--forgettings", "12", "--kills", "6", "--ingestions", "3", "--seed", "0"]
    run = subprocess.run(
        [sys.executable, str(script), "--only", what, *counts], capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0 and what in run.stdout, run.stdout + run.stderr


def test_many_threads_with_mixed_methods_get_the_answers_of_one_after_another(tmp_path: Path) -> None:
    counts = threads(tmp_path, count=64, requests=2, prompts=2)
    verdict(counts)
    assert counts.done["requests"] == 128


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read as Linux shows it")
def test_requests_leave_no_memory_behind(tmp_path: Path) -> None:
    verdict(memory(requests=30, warm_up=30, bound=128 << 10))  # a fifth of one prompt's KV
