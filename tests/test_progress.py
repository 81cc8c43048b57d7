"""What commands say on stderr while they work."""

from __future__ import annotations

import pytest

from cacheclip_rag.cli.progress import EVERY, bar, lines, timed


def test_each_stage_is_said_when_it_begins_and_then_now_and_then() -> None:
    said: list[str] = []
    now = [0.0]
    show = lines(said.append, lambda: now[0])
    show("opening the model", 0, 0)
    for done in range(4):
        show("reading chunks", done, 4_000)
    assert said == ["opening the model", "reading chunks, 0 of 4,000"]
    for second in range(1, 3 * int(EVERY)):
        now[0] = float(second)
        show("reading chunks", 1_000 + second, 4_000)
    assert said[2:] == ["reading chunks, 1,015 of 4,000", "reading chunks, 1,030 of 4,000"]


def test_stages_that_come_again_and_again_are_said_once() -> None:
    said: list[str] = []
    show = lines(said.append, lambda: 0.0)
    for _ in range(5):
        show("full prefill", 0, 0)
        show("reuse", 0, 0)
    assert said == ["full prefill", "reuse"]


def test_where_stderr_is_no_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("ready") as progress:
        progress("opening the model", 0, 0)
    out, err = capsys.readouterr()
    first, last = err.splitlines()
    assert out == "" and first == "cacheclip: opening the model" and last.startswith("cacheclip: ready in ")


def test_what_failed_is_not_said_to_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError), bar() as progress:
        progress("reading files", 0, 0)
        raise OSError
    assert capsys.readouterr().err == "cacheclip: reading files\n"


def test_at_a_terminal_there_is_a_bar_and_no_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with timed("answered"), bar("ready") as progress:
        progress("opening the model", 0, 0)
    out, err = capsys.readouterr()
    assert out == "" and "opening the model" in err and "cacheclip:" not in err and " in " not in err
