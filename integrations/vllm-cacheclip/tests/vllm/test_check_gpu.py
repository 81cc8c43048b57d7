"""check_gpu.py, as far as it can be tried without a GPU: what it rests on is there, and what fails is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "check_gpu.py"
sys.path.insert(0, str(SCRIPT.parent))

import check_gpu  # noqa: E402


@pytest.mark.parametrize("part", check_gpu.RELIES)
def test_lines_that_it_rests_on_are_in_vllm(part: str) -> None:
    _, _, number = check_gpu.source_line(part).rpartition(":")
    assert number.isdigit()


@pytest.mark.parametrize(("gpus", "ranks"), [(1, 0), (2, 1)])
def test_all_backends_runners_and_graphs_are_tried(gpus: int, ranks: int) -> None:
    settings = check_gpu.settings("cuda", False, gpus)
    assert len({setting["name"] for setting in settings}) == len(settings)
    assert sum("tensor_parallel_size" in setting["options"] for setting in settings) == ranks
    one = [setting for setting in settings if setting["kind"] == "check" and "tensor" not in str(setting["options"])]
    tried = {
        (options["attention_backend"], options["enforce_eager"], setting["environment"]["VLLM_USE_V2_MODEL_RUNNER"])
        for setting in one
        for options in [setting["options"]]
    }
    assert len(tried) == len(one) == 3 * 2 * 2


@pytest.mark.parametrize(("passed", "minutes", "status"), [(True, 9.0, 0), (False, 9.0, 1), (True, 0.0, 2)])
def test_the_exit_status_says_what_came_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, passed: bool, minutes: float, status: int
) -> None:
    def run(setting: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
        return [{"setting": setting["name"], "check": "one", "found": "it", "passed": passed}]

    monkeypatch.setattr(check_gpu, "run", run)
    rows = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--small", "--minutes", str(minutes), "--json", str(rows)]
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", *arguments])
    assert check_gpu.main() == status
    assert len(rows.read_text().splitlines()) == (4 if minutes else 0)


def test_it_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["check_gpu.py"])
    assert check_gpu.main() == 2 and "--device cpu --small" in capsys.readouterr().err


def test_a_setting_passes_on_a_cpu(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--json", str(rows)]
    done = subprocess.run([*command, "--only", "eager, bfloat16"], capture_output=True, text=True, timeout=500)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(found) == 10 and all(row["passed"] for row in found)
