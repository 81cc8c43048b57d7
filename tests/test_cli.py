"""The command line, as far as it goes without a network."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from cacheclip_rag.cli import main as cli
from cacheclip_rag.weights.catalogue import CATALOGUE

runner = CliRunner()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHECLIP_HOME", str(tmp_path / "home"))


def _folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def test_pull_prints_one_path_a_line(tmp_path: Path) -> None:
    one, two = _folder(tmp_path / "one"), _folder(tmp_path / "two")
    result = runner.invoke(cli.app, ["pull", str(one), str(two)])
    assert result.exit_code == 0
    assert result.stdout == f"{one}\n{two}\n"


def test_errors_are_one_line_on_stderr(tmp_path: Path) -> None:
    one = _folder(tmp_path / "one")
    result = runner.invoke(cli.app, ["pull", str(one), "no-such-model"])
    assert result.exit_code == 2
    assert result.stdout == f"{one}\n"
    assert result.stderr.startswith("cacheclip: no model is called 'no-such-model'.")
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


def test_list(tmp_path: Path) -> None:
    marker = tmp_path / "home" / "models" / "all-minilm-l6-v2" / "cacheclip.json"
    marker.parent.mkdir(parents=True)
    marker.write_text("{}")
    result = runner.invoke(cli.app, ["pull", "--list"])
    assert result.exit_code == 0
    for model in CATALOGUE.values():
        assert model.name in result.stdout and model.hub_id in result.stdout
    pulled = [line.split()[0] for line in result.stdout.splitlines() if line.endswith("[pulled]")]
    assert pulled == ["all-minilm-l6-v2"]


def test_pull_needs_a_name() -> None:
    result = runner.invoke(cli.app, ["pull"])
    assert result.exit_code == 2 and "NAME" in result.stderr


def test_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "version", lambda name: "1.2.3" if name == "cacheclip-rag" else "")
    assert runner.invoke(cli.app, ["--version"]).stdout == "1.2.3\n"


def test_version_of_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(cli, "version", missing)
    assert runner.invoke(cli.app, ["--version"]).stdout == "0+unknown\n"


def test_brackets_in_help_are_shown() -> None:
    """Typer takes what stands in brackets for markup."""
    shown = " ".join(runner.invoke(cli.app, ["eval", "--help"], env={"COLUMNS": "200"}).stdout.split())
    assert "[name=]FILE.jsonl" in shown and "name[@ratio][:param=value,...]" in shown


def _commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, one in getattr(command, "commands", {}).items():
        yield from _commands(one, (*words, name))
    if not hasattr(command, "commands"):
        yield words, command


_COMMANDS = list(_commands(get_command(cli.app)))


@pytest.mark.parametrize("words, command", _COMMANDS, ids=[" ".join(words) for words, _ in _COMMANDS])
def test_help_names_every_option_s_default(words: tuple[str, ...], command: Any) -> None:
    """But for switches, which are off."""
    shown = runner.invoke(cli.app, [*words, "--help"], env={"COLUMNS": "300"}).stdout.splitlines()
    for option in command.params:
        if option.param_type_name != "option" or (option.is_flag and not option.secondary_opts):
            continue
        [line] = [line for line in shown if line.strip("│* ").startswith(f"{option.opts[0]} ")]
        assert "[required]" in line or "[default: " in line, option.name
        if option.default not in (None, "", ...) and not option.is_flag:
            assert f"[default: {option.default}]" in line


def test_the_defaults_that_help_writes_out_are_those_of_the_code() -> None:
    folder = pytest.importorskip("cacheclip_app.folder")
    default = folder.Library(Path("home"))
    shown = runner.invoke(cli.app, ["ingest", "--help"], env={"COLUMNS": "300"}).stdout
    for value in (default.model, default.chunk_size, f"{folder.DISK_BYTES >> 30}GiB", str(default.auxiliary).lower()):
        assert f"[default: (last time's, else {value})]" in shown
