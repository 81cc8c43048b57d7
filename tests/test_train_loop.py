"""The training loop: it goes on where it was stopped, stops by held-out questions, and keeps the last good state."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cacheclip_train.loop import CHECKPOINT, Outcome, Settings, TrainingError, train
from training import Line

from cacheclip_rag import ConfigurationError

SETTINGS = Settings(epochs=4, batch=3, lr=0.05, every=2, patience=50)


def run(
    task: Line, folder: Path, settings: Settings = SETTINGS, hours: float | None = None, **identity: Any
) -> Outcome:
    return train(task, settings, folder, {"kind": "line", **identity}, hours, lambda what, done, total: None)


def test_it_trains(tmp_path):
    task = Line()
    outcome = run(task, tmp_path)
    assert (outcome.ended, outcome.steps, task.seen, outcome.tokens) == ("done", 16, 40, 280)
    assert outcome.gained and outcome.best["loss"] < outcome.first["loss"] == pytest.approx(0.09)
    assert task.saved and task.saved[-1][-1]["held_out"] == outcome.best


def test_steps_end_it_and_the_rate_decays_over_them(tmp_path):
    short, whole = Line(), Line()
    settings = Settings(epochs=4, batch=10, lr=1e-3, every=1, patience=50)
    assert run(short, tmp_path / "short", dataclasses.replace(settings, steps=2)).steps == 2
    assert run(whole, tmp_path / "whole", settings).steps == 4
    # AdamW with one gradient again and again moves by the rate: (1 + 1) lr where 2 steps were asked for, else more.
    assert float(short.weight[0].detach()) == pytest.approx(2e-3, rel=0.01)
    assert float(whole.weight[0].detach()) == pytest.approx(3e-3, rel=0.01)


@pytest.mark.parametrize("stop", [2, 7, 20, 31])
def test_interrupted_anywhere_it_ends_where_it_would_have(tmp_path, stop):
    whole, broken, again = Line(), Line(stop=stop), Line()
    expected = run(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt) as kept:  # as a notebook keeps its last error, with all its frames
        run(broken, tmp_path / "broken")
    outcome = run(again, tmp_path / "broken")
    assert kept.tb is not None
    assert torch.equal(again.weight, whole.weight) and again.seen < whole.seen + 10
    assert (outcome.steps, outcome.tokens, outcome.best) == (expected.steps, expected.tokens, expected.best)


def test_paused_it_goes_on(tmp_path):
    whole, task = Line(), Line()
    run(whole, tmp_path / "whole")
    assert run(task, tmp_path / "paused", hours=0.0).ended == "paused" and task.seen == 0
    assert run(task, tmp_path / "paused").ended == "done"
    assert torch.equal(task.weight, whole.weight)
    seen = task.seen
    assert run(Line(), tmp_path / "paused").ended == "done" and task.seen == seen, "what is done is not done again"


def test_it_stops_when_held_out_questions_gain_nothing_more(tmp_path):
    task = Line(flat=True)
    outcome = run(task, tmp_path, Settings(epochs=50, batch=3, every=1, patience=4))
    assert (outcome.ended, outcome.steps, outcome.gained, task.saved) == ("early", 4, False, [])


def test_a_loss_that_is_no_number_stops_it_and_keeps_the_last_good_state(tmp_path):
    with pytest.raises(TrainingError, match=r"loss of step 6 .* lower --lr"):
        run(Line(fail=13), tmp_path)
    state = torch.load(tmp_path / CHECKPOINT / "state.pt", weights_only=True)
    assert state["step"] == 4 and state["trained"]["weight"].isfinite().all()
    again, whole = Line(), Line()
    run(again, tmp_path)
    run(whole, tmp_path / "whole")
    assert torch.equal(again.weight, whole.weight)


def test_a_folder_of_another_training_is_refused(tmp_path):
    run(Line(), tmp_path, hours=0.0)
    with pytest.raises(ConfigurationError, match=r"another lr: .* another --out"):
        run(Line(), tmp_path, Settings(epochs=4, batch=3, lr=0.1, every=2, patience=50))
    with pytest.raises(ConfigurationError, match="another model"):
        run(Line(), tmp_path, model="other")


def test_a_damaged_checkpoint_is_said(tmp_path):
    run(Line(), tmp_path, hours=0.0)
    (tmp_path / CHECKPOINT / "state.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        run(Line(), tmp_path)


def test_one_process_trains_in_a_folder(tmp_path):
    code = (
        "import sys; sys.path[:0] = ['tests']\n"
        "from test_train_loop import *\n"
        f"print(run(Line(), Path({str(tmp_path)!r}), hours=0.0).ended)"
    )

    class Meanwhile(Line):
        def held_out(self) -> dict[str, float]:
            root = Path(__file__).parents[1]
            done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
            assert "another process trains" in done.stderr
            return super().held_out()

    run(Meanwhile(), tmp_path, hours=0.0)


def test_the_log_has_every_look(tmp_path):
    run(Line(), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / CHECKPOINT / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(0, 17, 2))
