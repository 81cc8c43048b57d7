"""``cacheclip store ...``: no model is loaded."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from stores import HUGE, KEYED, make
from typer.testing import CliRunner

from cacheclip_rag.chunks import Namespace
from cacheclip_rag.cli import store as store_cli
from cacheclip_rag.cli.main import app
from cacheclip_rag.store import DiskStore, Documents, files

runner = CliRunner()
MODEL = Namespace({"architecture": "qwen2", "dtype": "bfloat16", "encoder": "Isolated()", "tenant": "acme"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    for namespace, count in ((MODEL, 3), (KEYED, 1)):
        store = DiskStore(folder, namespace, HUGE, sync=False)
        for number in range(count):
            text = f"chunk number {number} \x1b[31m of a document"
            assert store.put(namespace.key(text), make(text, tokens=10 + number))
    return folder


def run(folder: Path, *arguments: str, code: int = 0) -> Any:
    result = runner.invoke(app, ["store", arguments[0], "--store", str(folder), *arguments[1:]])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if "--json" in arguments else result.stdout


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_stats(folder: Path) -> None:
    text = run(folder, "stats")
    assert "qwen2 bfloat16" in text and "tenant acme" in text and "keyed" in text and "4 chunks" in text
    (one, two) = run(folder, "stats", "--json")
    assert (one["entries"], one["tokens"], one["bytes_per_token"]) == (3, 33, 2 * 2 * 3 * 4 * 2)
    assert one["about"]["architecture"] == "qwen2" and two["entries"] == 1
    assert one["nbytes"] + two["nbytes"] == sum(path.stat().st_size for path in files_of(folder))


def test_list_shows_no_control_characters_and_no_text_in_json_unless_asked(folder: Path) -> None:
    text = run(folder, "list")
    assert "chunk number 2 ?[31m" in text and "\x1b" not in text and text.count("\n") == 4
    assert all("text" not in entry for entry in run(folder, "list", "--json"))
    entries = run(folder, "list", "--json", "--text", "--namespace", MODEL.digest[:6])
    assert sorted(entry["tokens"] for entry in entries) == [10, 11, 12]
    assert all(MODEL.key(entry["text"]) == entry["key"] for entry in entries)


def test_verify(folder: Path, tmp_path: Path) -> None:
    assert "3 chunks" in run(folder, "verify") and "1 keyed" in run(folder, "verify")
    secret = tmp_path / "secret"
    secret.write_bytes(KEYED.secret + b"\n")
    assert run(folder, "verify", "--secret-file", str(secret), "--json")["good"] == 4
    victim = next(path for path in files_of(folder) if path.parent.name == MODEL.digest[:32])
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    result = run(folder, "verify", "--json", code=1)
    assert result["bad"] == [[f"{victim.parent.name}/{victim.name}", "checksum"]] and victim.exists()
    victim.rename(victim.with_name("0" * 64 + ".safetensors"))
    assert run(folder, "verify", "--json", code=1)["bad"][0][1] == "other key"


def test_gc(folder: Path) -> None:
    old, young, bad = (folder / MODEL.digest[:32] / name for name in (".tmp-1-a", ".tmp-2-b", "0" * 64 + ".bad"))
    for path in (old, young, bad):
        path.write_bytes(b"12345")
    os.utime(old, (time.time() - 7200,) * 2)
    assert run(folder, "gc", "--json") == {"chunks": 0, "garbage": 2, "nbytes": 10}
    assert young.exists() and len(files_of(folder)) == 4
    oldest = files_of(folder)[2]
    os.utime(oldest, (time.time() - 10 * 86_400,) * 2)
    assert "removed 1 chunks" in run(folder, "gc", "--unused-days", "7") and not oldest.exists()
    run(folder, "gc", "--cap", "4kB")
    assert sum(path.stat().st_size for path in files_of(folder)) <= 4000
    assert "is no size" in runner.invoke(app, ["store", "gc", "--store", str(folder), "--cap", "lots"]).stderr


def test_forget(folder: Path, tmp_path: Path) -> None:
    document = tmp_path / "document.txt"
    document.write_text("Before.\n\nchunk number 1 \x1b[31m   of a\ndocument\n\nAfter.")
    assert run(folder, "forget", str(document), "--json")["removed"] == 1
    assert run(folder, "forget", "--containing", "number 0", "--json") | {"nbytes": 0} == {
        "removed": 2,
        "nbytes": 0,
        "left": 0,
    }
    assert len(files_of(folder)) == 1
    assert "give a DOCUMENT" in runner.invoke(app, ["store", "forget", "--store", str(folder)]).stderr
    run(folder, "forget", "--containing", " ", code=2)
    run(folder, "forget", str(tmp_path / "missing.txt"), code=2)


def test_clear(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    words = ["store", "clear", "--store", str(folder)]
    asked = runner.invoke(app, words, input="n\n")
    assert asked.exit_code == 1 and f"Remove all chunk KV in {folder}?" in asked.stdout
    of_some = runner.invoke(app, [*words, "--namespace", "ab12"], input="n\n")
    assert of_some.exit_code == 1 and f"Remove all chunk KV of namespaces ab12... in {folder}?" in of_some.stdout
    assert len(files_of(folder)) == 4
    assert run(folder, "clear", "--yes", "--namespace", MODEL.digest[:8]) == "removed 3 chunks\n"
    assert run(folder, "clear", "--yes", "--json") == {"removed": 1}
    assert not [path for path in folder.iterdir() if path.is_dir()] and (folder / "notes.txt").exists()


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path / "file"):
        if path.name == "file":
            path.write_text("x")
        result = runner.invoke(app, ["store", "stats", "--store", str(path)])
        assert result.exit_code == 2 and "is no chunk store" in result.stderr and result.stderr.count("\n") == 1
    assert run(tmp_path, "stats", "--json") == []


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 << 30), ("500MB", 500_000_000), ("1000", 1000), ("1.5 kib", 1536), ("2t", 2 * 10**12)]
)
def test_sizes(text: str, size: int) -> None:
    assert store_cli.room(Path("anywhere"), cap=text) == size


# ---- secrets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [b"hush", b"hush ", b"hush\n", b"hush\r\n", b" hush\t \n\n", b"\n"])
@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_a_secret_may_end_with_a_blank(tmp_path: Path, secret: bytes, ending: bytes) -> None:
    """And a file that holds one may end with a line break, as editors have it."""
    folder, file = tmp_path / "store", tmp_path / "secret"
    file.write_bytes(secret + ending)
    keyed = Namespace(MODEL.fields, secret)
    store = DiskStore(folder, keyed, HUGE, sync=False)
    DiskStore(folder, KEYED, HUGE, sync=False).put(KEYED.key("another's"), make("another's"))
    store.put(keyed.key("text 0"), make("text 0"))
    Documents(folder, "acme", secret).add("one", ["text 0"])
    document = ("--document", "one", "--tenant", "acme", "--secret-file", str(file), "--json")
    if not secret.strip() and ending:  # which of the line breaks is meant is known by the chunks
        assert run(folder, "verify", "--secret-file", str(file), "--json")["good"] == 1
    assert run(folder, "verify", "--secret-file", str(file), "--json")["unproved"] == 1
    assert [one["entries"] for one in run(folder, "stats", *document)] == [1]
    assert run(folder, "forget", *document) == {"removed": 1, "nbytes": store.stats().nbytes, "left": 0}
    assert not Documents(folder, "acme", secret).of("one")


def test_a_secret_whose_chunks_are_gone_is_known_by_its_documents(tmp_path: Path) -> None:
    folder, file = tmp_path / "store", tmp_path / "secret"
    file.write_bytes(b"hush \n")
    DiskStore(folder, KEYED, HUGE, sync=False).put(KEYED.key("another's"), make("another's"))
    Documents(folder, "", b"hush ").add("one", ["text 0"])
    run(folder, "forget", "--document", "one", "--secret-file", str(file))
    assert not Documents(folder, "", b"hush ").of("one")


def test_a_secret_that_fits_nothing_is_an_error(folder: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "secret"
    wrong.write_bytes(b"correct horse battery")
    for command in (("verify",), ("stats", "--document", "x"), ("forget", "--document", "x")):
        result = runner.invoke(
            app, ["store", command[0], "--store", str(folder), *command[1:], "--secret-file", str(wrong)]
        )
        assert result.exit_code == 2 and "not that of any of the keyed chunks" in result.stderr, command
    assert len(files_of(folder)) == 4
    result = runner.invoke(app, ["store", "forget", "--store", str(folder), "--document", "unknown"])
    assert result.exit_code == 0 and "nothing is known" in result.stderr


# ---- what others wrote ---------------------------------------------------------------------------------------------

ESCAPES = "\x1b[2J\x1bc\u202e\x9b31m"


def hostile(folder: Path) -> None:
    """A file whose header, and files whose names, hold what a terminal takes for commands."""
    fields = {name: ESCAPES for name in ("format", "architecture", "weights", "tenant", "encoder", "dtype")}
    namespace = Namespace(fields)
    store = DiskStore(folder, namespace, HUGE, sync=False)
    key = namespace.key("x" * 70)
    store.put(key, make("x" * 70))
    path = store.path / f"{key}.safetensors"
    data = path.read_bytes()
    other = path.with_name("0" * 64 + ".safetensors")
    other.write_bytes(data.replace(key.encode(), (ESCAPES * 9).encode()[:64].ljust(64, b"x"), 1))
    (store.path / f".tmp-{ESCAPES}").write_bytes(b"")
    for odd in (other, store.path / f".tmp-{ESCAPES}"):
        odd.chmod(0o644)


@pytest.mark.parametrize(
    "command", [["stats"], ["list"], ["list", "--text"], ["verify"], ["forget", "--containing", "zzz"], ["gc"]]
)
def test_nothing_that_others_wrote_steers_the_terminal(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile(tmp_path)
    if command[0] == "forget":
        monkeypatch.setattr(files, "remove", lambda *_: (_ for _ in ()).throw(PermissionError(13, ESCAPES)))
    result = runner.invoke(app, ["store", command[0], "--store", str(tmp_path), *command[1:]])
    assert result.exit_code == {"verify": 1, "forget": 2}.get(command[0], 0), result.output
    assert result.output and not set(ESCAPES) & set("\x1b\x9b\u202e") & set(result.output), result.output
    assert not {"\x1b", "\x9b", "\u202e"} & set(result.output)


def test_an_error_s_message_does_not_steer_the_terminal(tmp_path: Path) -> None:
    result = runner.invoke(app, ["store", "stats", "--store", str(tmp_path / ESCAPES)])
    assert result.exit_code == 2 and "\x1b" not in result.output and "is no chunk store" in result.stderr
