"""PyTorch computes with no more threads than there are CPUs that the process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cacheclip_rag.cli.main import app
from cacheclip_rag.model import threads
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.model.threads import Allowance, allowance


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def group(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),  # a container, as it sees itself
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "300000 100000\n"}, 2.0),
        ("0::/of/the/host\n", {"cpu.max": "50000 100000\n"}, 0.5),
        (
            "4:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("0::/../..\n", {"cpu.max": "what is this"}, None),
        ("nonsense\n\n:::\n", {}, None),
    ],
)
def test_the_quota_of_the_control_groups(tmp_path: Path, own: str, files: dict[str, str], quota: float | None) -> None:
    (tmp_path / "own").write_text(own)
    found = allowance(group(tmp_path / "groups", files), tmp_path / "own")
    assert found.quota == quota and found.cpus >= 1


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert allowance(tmp_path, tmp_path / "none").quota is None


@pytest.mark.parametrize(
    ("cpus", "quota", "expected"), [(8, None, 8), (8, 2.0, 2), (8, 2.9, 2), (2, 4.0, 2), (4, 0.3, 1), (1, None, 1)]
)
def test_threads_are_those_that_can_run_all_the_time(cpus: int, quota: float | None, expected: int) -> None:
    assert Allowance(cpus, quota).threads == expected


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity is Linux's")
def test_affinity_counts() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert allowance().cpus == 1 and allowance().threads == 1
    finally:
        os.sched_setaffinity(0, before)


def test_loading_a_model_lowers_the_number_and_never_raises_it(stand_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "allowance", lambda: Allowance(8, 2.0))
    torch.set_num_threads(4)
    loaded = Backbone.load(stand_in)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    Backbone.load(stand_in)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(4)
    Backbone(loaded.model, loaded.tokenizer)  # whoever loads a model himself has set what he wants
    assert torch.get_num_threads() == 4


def test_verify_says_how_many(stand_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHECLIP_HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["verify", stand_in, "--dtype", "float32", "--device", "cpu"])
    count = torch.get_num_threads()
    assert f"computing with {count} thread{'s' * (count > 1)}; this process may use {allowance()}\n" in result.output
