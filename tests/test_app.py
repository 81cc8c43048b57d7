"""`cacheclip ingest` and `cacheclip ask` over a folder of a hundred documents, with a tiny random model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("llama_index.readers.file")
from cacheclip_app.embedding import MiniLM
from cacheclip_app.folder import Library, text_of

from cacheclip_rag import Engine
from cacheclip_rag.cli import main as cli
from cacheclip_rag.kv.library import Library as KVLibrary
from cacheclip_rag.store import files
from cacheclip_rag.store.admin import Administration

TOWNS = ["Arden", "Bellow", "Corwen", "Dunmore", "Elsted", "Farlow", "Glanton", "Hexley", "Ingram", "Jarvis"]
THINGS = ["lighthouse", "railway", "bakery", "museum", "orchard"]
THINGS += ["printing-house", "observatory", "ferry", "theatre", "brewery"]


def paragraph(town: str, thing: str, year: int) -> str:
    return (
        f"The {thing} of {town} was founded in {year} by the council of the town, after a public vote. "
        f"It stands beside the old bridge and employs {year % 37 + 3} people, most of them from {town} itself. "
        f"Visitors are welcome at the {thing} on every day but Monday, and on {year % 28 + 1} May entry is free."
    )


def pdf(text: str) -> bytes:
    """The smallest PDF with one page of text."""
    lines = "".join(f"({part}) Tj T* " for part in text.split(". "))
    stream = f"BT /F1 9 Tf 12 TL 40 700 Td {lines}ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n" % len(stream) + stream + b"\nendstream",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    body, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(body))
        body += b"%d 0 obj\n" % number + content + b"\nendobj\n"
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return body + (
        b"xref\n0 6\n0000000000 65535 f \n"
        + table
        + b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(body)
    )


def write(folder: Path, number: int, year: int) -> Path:
    town, thing = TOWNS[number % 10], THINGS[number // 10]
    text = paragraph(town, thing, year)
    kind = ("txt", "md", "html", "pdf")[number % 4]
    path = folder / town / f"{thing}.{kind}"
    path.parent.mkdir(exist_ok=True)
    if kind == "pdf":
        path.write_bytes(pdf(text))
    elif kind == "html":
        path.write_text(f"<html><head><title>no</title></head><body><h1>{thing}</h1><p>{text}</p></body></html>")
    else:
        path.write_text(f"# {thing}\n\n{text}" if kind == "md" else text)
    return path


@pytest.fixture(scope="module")
def model(stand_in: str) -> str:
    return stand_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    for number in range(100):
        write(folder, number, 1800 + number)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "secret.txt").write_text("Nobody is to read this, which is long enough to be a chunk.")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("home")


def run(*words: object, **options: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words], **options)


def ingest(folder: Path, home: Path, model: str) -> dict[str, Any]:
    result = run("ingest", folder, "--home", home, "--model", model, "--auxiliary", "none", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def chunks(home: Path) -> dict[str, str]:
    """Every chunk by the file it is from."""
    nodes = Library.read(home).vectors().get_nodes(node_ids=None)
    return {node.metadata["source"]: text_of(node) for node in nodes}


def test_a_hundred_documents_from_first_to_last(folder: Path, home: Path, model: str) -> None:
    first = ingest(folder, home, model)
    assert (first["files"], first["chunks"], first["encoded"], first["removed"]) == (100, 100, 100, 0)
    assert first["disk_bytes"] == sum(file.stat().st_size for file in home.rglob("*.safetensors"))
    known = chunks(home)
    assert len(known) == 100 and not any("secret" in name or "photo" in name for name in known)
    html, page = known["Corwen/lighthouse.html"], known["Dunmore/lighthouse.pdf"]
    assert "founded in 1802" in html and "<p>" not in html and "founded in 1803" in page

    again = ingest(folder, home, model)
    assert (again["chunks"], again["encoded"], again["removed"]) == (100, 0, 0)

    changed = write(folder, 0, 1999)
    gone = write(folder, 1, 1801)
    gone.unlink()
    third = ingest(folder, home, model)
    assert (third["files"], third["chunks"], third["encoded"], third["removed"]) == (99, 99, 1, 2)
    old, known = known, chunks(home)
    assert "1999" in known["Arden/lighthouse.txt"] and "Bellow/lighthouse.md" not in known
    engine = Library.read(home).llm().engine
    assert engine.knows(known["Arden/lighthouse.txt"]) and changed.exists()
    assert not engine.knows(old["Arden/lighthouse.txt"])  # the KV of what is gone went with it
    assert not engine.knows(old["Bellow/lighthouse.md"])


def test_questions_find_and_reuse_chunks(folder: Path, home: Path, model: str) -> None:
    if not (home / "index").exists():
        ingest(folder, home, model)
    question = "When was the theatre of Glanton founded?"
    result = run("ask", question, "--home", home, "--json", "--tokens", 3, "--top-k", 4)
    assert result.exit_code == 0, result.output
    reply = json.loads(result.stdout)
    assert any(source.startswith("Glanton/theatre") for source in reply["sources"]) and len(reply["sources"]) == 4
    report = reply["report"]
    assert len(report["chunks"]) == 4 and report["reused"] > 0 and report["fallbacks"] == []

    shown = run("ask", question, "--home", home, "--tokens", 3, "--top-k", 4, "--compare")
    assert shown.exit_code == 0, shown.output
    assert "from Glanton/theatre" in shown.stdout and "full prefill answers: " in shown.stdout
    assert "estimated" not in shown.stdout  # it was measured

    compared = json.loads(
        run(
            "ask", question, "--home", home, "--tokens", 3, "--top-k", 4, "--method", "full", "--compare", "--json"
        ).stdout
    )
    assert compared["full_prefill"] == compared["answer"]  # the same prompt, prefilled in full both times

    session = run(
        "ask", "--home", home, "--tokens", 2, "--no-report", input=f"{question}\nAnd the brewery?\n\nno more\n"
    )
    assert session.exit_code == 0 and session.stdout.count("from ") == 2


def test_without_a_terminal_stderr_says_how_far_it_is(tmp_path: Path, model: str) -> None:
    documents, home = several(tmp_path / "documents", 3), tmp_path / "home"
    result = run(*words(documents, home, model, "--json"))
    said = result.stderr.splitlines()
    assert json.loads(result.stdout)["chunks"] == 3, "stdout has the result and nothing else"
    assert said[0] == "cacheclip: reading files" and said[-1].startswith("cacheclip: done in ")
    assert "cacheclip: embedding documents, 0 of 3" in said and "cacheclip: opening the model" in said
    assert any(line.startswith("cacheclip: reading chunks with the model, ") for line in said)
    asked = run("ask", "When was the lighthouse founded?", "--home", home, "--tokens", 1, "--json")
    opening, ready, answered = asked.stderr.splitlines()
    assert "answer" in json.loads(asked.stdout) and opening == "cacheclip: opening the model"
    assert ready.startswith("cacheclip: ready in ") and answered.startswith("cacheclip: answered in ")


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, told in (
        (("ask", "x", "--home", tmp_path / "nothing"), "run `cacheclip ingest FOLDER` first"),
        (("ingest", tmp_path / "nowhere", "--home", tmp_path), "nowhere does not exist"),
        (("ingest", write(tmp_path, 0, 1800), "--home", tmp_path), "lighthouse.txt is not a folder"),
        (("ingest", tmp_path / "empty", "--home", tmp_path / "home"), "holds no documents"),
        (("ingest", folder, "--home", tmp_path / "home", "--model", "no-such-model"), "no-such-model"),
    ):
        result = run(*words)
        assert result.exit_code == 2 and told in result.stderr, (words, result.output)
        assert "Traceback" not in result.output and "Errno" not in result.output
        assert not (tmp_path / "home").exists()  # nothing was begun


def kept(home: Path) -> str:
    """All that any file in the store says about its chunk."""
    return " ".join(stored.text for stored in Administration(home).entries())


def test_an_interrupted_ingestion_goes_on_and_still_forgets(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while documents are embedded, and once more while chunks are read."""
    documents, home = tmp_path / "documents", tmp_path / "home"
    documents.mkdir()
    for number in range(20):
        write(documents, number, 1800 + number)
    words = ("ingest", documents, "--home", home, "--model", model, "--auxiliary", "none", "--json")
    embedded: list[str] = []
    embed = MiniLM._get_text_embeddings

    def interrupted(self: MiniLM, texts: list[str]) -> list[list[float]]:
        if len(embedded) >= 16:
            raise KeyboardInterrupt
        embedded.extend(texts)
        return embed(self, texts)

    monkeypatch.setattr(MiniLM, "_get_text_embeddings", interrupted)
    assert run(*words).exit_code == 130
    assert len(chunks(home)) == 16  # as many as were embedded
    monkeypatch.setattr(
        MiniLM, "_get_text_embeddings", lambda self, texts: embedded.extend(texts) or embed(self, texts)
    )
    first = ingest(documents, home, model)
    assert (first["chunks"], first["encoded"], len(embedded)) == (20, 20, 20)  # nothing was embedded twice

    write(documents, 0, 1999)
    monkeypatch.setattr("cacheclip_app.folder.Library.llm", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(*words).exit_code == 130
    assert "founded in 1800" in kept(home)  # not yet
    monkeypatch.undo()
    second = ingest(documents, home, model)
    assert (second["encoded"], second["removed"]) == (1, 1)
    assert "founded in 1800" not in kept(home) and "founded in 1999" in kept(home)


def test_the_notes_of_an_ingestion_are_whole_wherever_it_ends(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it goes on from there, and leaves nothing of what is gone."""
    documents, home, fill = tmp_path / "documents", tmp_path / "home", files.fill
    documents.mkdir()
    for number in range(10):
        write(documents, number, 1800 + number)
    words = ("ingest", documents, "--home", home, "--model", model, "--auxiliary", "none", "--json")
    ingest(documents, home, model)
    (documents / "Arden" / "lighthouse.txt").unlink()
    for number in range(20):
        left = [number]

        def dies(path: Path, data: Any, sync: bool, left: list[int] = left) -> None:
            if path.parent.name == "index" and not left[0]:
                path.write_bytes(bytes(data)[: len(data) // 2])
                monkeypatch.setattr(files, "discard", lambda path: None)  # as after SIGKILL
                raise KeyboardInterrupt
            left[0] -= path.parent.name == "index"
            fill(path, data, sync)

        monkeypatch.setattr(files, "fill", dies)
        code = run(*words).exit_code
        monkeypatch.undo()
        for note in (home / "index").glob("*.json"):
            assert json.loads(note.read_text()), note
        if not code:
            break
    assert 3 < number < 19 and "founded in 1800" not in kept(home)
    left_over = [p for p in (home / "index").iterdir() if p.is_file() and b"founded in 1800" in p.read_bytes()]
    assert not left_over and not list((home / "index").glob(f"{files.TEMPORARY}*"))


def test_notes_that_an_earlier_version_left_half_written_are_made_again(tmp_path: Path, model: str) -> None:
    documents, home = tmp_path / "documents", tmp_path / "home"
    documents.mkdir()
    for number in range(3):
        write(documents, number, 1800 + number)
    ingest(documents, home, model)
    (documents / "Arden" / "lighthouse.txt").unlink()
    (home / "index" / "documents.json").write_text("")
    assert (ingest(documents, home, model)["removed"], len(chunks(home))) == (1, 2)
    assert "founded in 1800" not in kept(home)


def test_what_is_gone_is_forgotten_for_every_model_and_chunk_size(tmp_path: Path, model: str) -> None:
    documents, home = tmp_path / "documents", tmp_path / "home"
    documents.mkdir()
    page = write(documents, 0, 1800)
    page.write_text(" ".join(paragraph(town, "museum", 1850) for town in TOWNS))
    ingest(documents, home, model)
    with Engine(model, method="promptcache", store=home) as other:  # another reading of the same chunks
        other.ensure(chunks(home).values())
    small = run(
        "ingest", documents, "--home", home, "--model", model, "--auxiliary", "none", "--json", "--chunk-size", 128
    )
    assert json.loads(small.stdout)["removed"] > 0 and json.loads(small.stdout)["chunks"] > 1
    texts = {text_of(node) for node in Library.read(home).vectors().get_nodes(node_ids=None)}
    assert {stored.text for stored in Administration(home).entries()} == texts


def test_what_was_ingested_is_forgotten_by_its_file_or_its_name(tmp_path: Path, model: str) -> None:
    documents, home = tmp_path / "documents", tmp_path / "home"
    documents.mkdir()
    files = [write(documents, number, 1800 + number) for number in (0, 1, 2)]
    ingest(documents, home, model)
    by_name = run("store", "forget", "--document", "Corwen/lighthouse.html", "--store", home, "--json")
    assert json.loads(by_name.stdout)["removed"] == 1 and "founded in 1802" not in kept(home)
    by_text = run("store", "forget", files[0], "--store", home, "--json")
    assert json.loads(by_text.stdout)["removed"] == 1 and "founded in 1800" not in kept(home)
    assert "founded in 1801" in kept(home)


def test_the_index_is_its_owners_only(tmp_path: Path, model: str) -> None:
    """It holds the documents' text. An index of an earlier version is closed, too."""
    documents, home = tmp_path / "documents", tmp_path / "home"
    documents.mkdir()
    write(documents, 0, 1800)
    ingest(documents, home, model)
    assert {path.stat().st_mode & 0o777 for path in (home, home / "index")} == {0o700}
    (home / "index").chmod(0o755)
    ingest(documents, home, model)
    assert (home / "index").stat().st_mode & 0o777 == 0o700


def test_a_second_ingestion_needs_no_options(tmp_path: Path, model: str) -> None:
    documents, home = tmp_path / "documents", tmp_path / "home"
    documents.mkdir()
    write(documents, 0, 1800)
    words = ("ingest", documents, "--home", home)
    assert run(*words, "--model", model, "--auxiliary", "none", "--chunk-size", 200).exit_code == 0
    assert run(*words).exit_code == 0
    assert Library.read(home) == Library(home, model, None, 200)
    assert run(*words, "--chunk-size", 128).exit_code == 0
    assert Library.read(home) == Library(home, model, None, 128)


def test_settings_that_are_not_given_are_last_time_s_or_the_defaults(tmp_path: Path) -> None:
    assert Library.given(tmp_path, model=None, auxiliary=None, chunk_size=None) == Library(tmp_path)
    for none in ("none", "NONE", ""):
        assert Library.given(tmp_path, auxiliary=none).auxiliary is None
    kept = Library(tmp_path, "a", "b", 100)
    kept.folder.mkdir()
    kept.write()
    assert Library.given(tmp_path, model=None, auxiliary=None, chunk_size=None) == kept
    assert Library.given(tmp_path, auxiliary="none") == Library(tmp_path, "a", None, 100)
    assert Library.given(tmp_path, model="c", auxiliary="d", chunk_size=200) == Library(tmp_path, "c", "d", 200)


def test_a_method_for_fused_chunks(folder: Path, home: Path, model: str) -> None:
    if not (home / "index").exists():
        ingest(folder, home, model)
    fused = run("fuse", "--model", model, "--store", home, "--similar", "--count", 3, "--json")
    assert fused.exit_code == 0 and json.loads(fused.stdout)["fused"] > 0, fused.output
    words = ("ask", "When was the theatre of Glanton founded?", "--home", home, "--json", "--tokens", 1, "--top-k", 4)
    alone, together = (json.loads(run(*words, "--method", name).stdout)["report"] for name in ("query_guided", "auto"))
    assert alone["fit"] is None and together["method"] == "auto" and together["fit"] > 0
    wrong = run(*words, "--method", "nonsense")
    assert wrong.exit_code == 2 and "unknown method" in wrong.stderr


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, model: str) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    write(documents, 0, 1800)
    (documents / "broken.pdf").write_bytes(b"not a pdf")
    result = run("ingest", documents, "--home", tmp_path / "home", "--model", model, "--auxiliary", "none", "--json")
    assert result.exit_code == 1 and "broken.pdf" in result.stderr
    assert json.loads(result.stdout)["unread"] == ["broken.pdf"]


# ---- a store that is too small -----------------------------------------------------------------------------------


def several(folder: Path, count: int = 12) -> Path:
    folder.mkdir()
    for number in range(count):
        write(folder, 4 * number, 1800 + number)  # of one kind
    return folder


def words(folder: Path, home: Path, model: str, *more: object) -> list[object]:
    return ["ingest", folder, "--home", home, "--model", model, "--auxiliary", "none", *more]


def test_a_store_that_is_too_small_keeps_what_it_has_room_for_and_says_so(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = several(tmp_path / "documents")
    size = ingest(documents, tmp_path / "large", model)["disk_bytes"]
    encoded: list[str] = []
    encode = KVLibrary.ensure_each

    def counted(self: KVLibrary, texts: list[str]) -> Any:
        encoded.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(KVLibrary, "ensure_each", counted)
    home, cap = tmp_path / "small", size // 2
    for time in range(2):
        encoded.clear()
        result = run(*words(documents, home, model, "--cap", cap, "--json"))
        assert result.exit_code == 1, result.output
        told = json.loads(result.stdout)
        assert told["chunks"] == 12 and 4 <= told["kept"] <= 6 and told["no_room"] == 12 - told["kept"]
        assert told["encoded"] == len(encoded) == (0 if time else told["kept"]), "nothing is encoded to be evicted"
        kept = {stored.text for stored in Administration(home).entries()}
        assert len(kept) == told["kept"] and sum(p.stat().st_size for p in home.rglob("*.safetensors")) <= cap
        assert f"room for {told['kept']} of 12" in result.stderr, "while it happens"
        assert f"{told['no_room']} of 12 chunks have no KV" in result.stderr, "and at the end"
    assert Library.read(home).disk_bytes == cap, "who asks keeps the same cap"
    assert Library.read(home).llm().engine.library.store.tiers[-1].cap == cap
    enough = run(*words(documents, home, model, "--cap", 2 * size))
    assert enough.exit_code == 0 and "12 kept" in enough.stdout and "no KV" not in enough.stderr


def test_other_models_chunks_make_room_for_an_ingestion(tmp_path: Path, model: str) -> None:
    documents, home = several(tmp_path / "documents", 6), tmp_path / "home"
    size = ingest(documents, home, model)["disk_bytes"]
    with Engine(model, method="promptcache", store=home) as other:
        other.ensure(chunks(home).values())
    for path in home.rglob("*.safetensors"):
        if path.parent.name == other.library.namespace.digest[:32]:
            os.utime(path)
    result = run(*words(documents, home, model, "--cap", size + size // 4, "--json"))
    assert result.exit_code == 0 and json.loads(result.stdout)["kept"] == 6, result.output


def test_a_dry_run_says_what_it_is_and_keeps_nothing(tmp_path: Path, model: str) -> None:
    documents, home = several(tmp_path / "documents"), tmp_path / "home"
    dry = run(*words(documents, home, model, "--dry-run", "--json"))
    assert dry.exit_code == 0 and not home.exists(), dry.output
    plan = json.loads(dry.stdout)
    done = ingest(documents, home, model)
    assert (plan["files"], plan["chunks"], plan["new"], plan["fitting"]) == (12, 12, 12, 12)
    assert plan["nbytes"] == pytest.approx(done["disk_bytes"], rel=0.01) and plan["minutes"] > 0
    entries = list(Administration(home).entries())
    assert plan["tokens"] == sum(stored.tokens for stored in entries)
    before = sorted((path, path.stat().st_mtime_ns) for path in home.rglob("*"))
    again = json.loads(run(*words(documents, home, model, "--dry-run", "--json")).stdout)
    assert (again["new"], again["minutes"]) == (0, 0) and again["nbytes"] == plan["nbytes"]
    small = run(*words(documents, home, model, "--dry-run", "--cap", done["disk_bytes"] // 2))
    assert small.exit_code == 1 and "of 12 chunks" in small.stderr and "12 chunks of" in small.stdout
    assert before == sorted((path, path.stat().st_mtime_ns) for path in home.rglob("*"))


# ---- what a folder may hold --------------------------------------------------------------------------------------


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path: Path, model: str) -> None:
    documents, home, outside = several(tmp_path / "documents", 2), tmp_path / "home", tmp_path / "outside"
    outside.mkdir()
    secret = outside / "secret.txt"
    secret.write_text("Nobody is to read this, which is long enough to be a chunk, and stands in another folder.")
    (documents / ".hidden").mkdir()
    (documents / ".hidden" / "notes.txt").write_text(secret.read_text())
    (documents / "inside.txt").symlink_to(documents / "Arden" / "lighthouse.txt")
    (documents / "a.txt").symlink_to(secret)
    (documents / "b.txt").symlink_to(Path("..") / "outside" / "secret.txt")
    (documents / "c.txt").symlink_to(documents / "a.txt")
    (documents / "d.txt").symlink_to(documents / ".hidden" / "notes.txt")
    (documents / "folder").symlink_to(outside)
    (documents / "gone.txt").symlink_to(outside / "nothing.txt")
    result = run(*words(documents, home, model, "--json"))
    told = json.loads(result.stdout)
    assert told["passed_over"] == ["a.txt", "b.txt", "c.txt", "d.txt", "folder"]
    assert told["files"] == 3 and "Nobody" not in kept(home) and "a.txt: a link" in result.stderr
    (tmp_path / "link").symlink_to(documents)  # the folder itself may be one
    assert json.loads(run(*words(tmp_path / "link", home, model, "--json")).stdout)["files"] == 3
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.txt").symlink_to(secret)
    assert "links that lead out" in run(*words(tmp_path / "only", home, model)).stderr


@pytest.mark.parametrize(
    "name", ["notes[/x].md", "[red]r[/red].md", "[link=http:x]a.md", "a\x1b[2Jb.md", "a\nb\u202e.md"]
)
def test_a_file_s_name_is_neither_markup_nor_a_command(tmp_path: Path, model: str, name: str) -> None:
    documents, home = tmp_path / "documents", tmp_path / "home"
    (documents / name).parent.mkdir(parents=True)
    (documents / name).write_text(paragraph("Arden", "ferry", 1800))
    (documents / f"empty {name}").parent.mkdir(exist_ok=True)
    (documents / f"empty {name}").write_text("")
    result = run(*words(documents, home, model))
    assert result.exit_code == 1 and not {"\x1b", "\u202e"} & set(result.output), result.output
    assert len([line for line in result.stderr.splitlines() if "empty" in line]) == 1
    asked = run("ask", "When was the ferry founded?", "--home", home, "--tokens", 1)
    assert asked.exit_code == 0 and not {"\x1b", "\u202e"} & set(asked.output), asked.output
    shown = "".join(c if c.isprintable() or c.isspace() else "?" for c in name).replace("\n", " ")
    assert f"from {shown}\n" in asked.stdout


def test_a_name_that_is_no_text_is_passed_over(tmp_path: Path, model: str) -> None:
    documents = several(tmp_path / "documents", 1)
    odd = Path(os.fsdecode(os.fsencode(documents) + b"/odd \xff.txt"))
    odd.write_text(paragraph("Arden", "ferry", 1800))
    result = run(*words(documents, tmp_path / "home", model))
    assert result.exit_code == 0 and "passed over odd ?.txt" in result.stderr


def test_folders_above_a_new_home_are_their_owner_s(tmp_path: Path, model: str) -> None:
    documents, home = several(tmp_path / "documents", 1), tmp_path / "far above" / "above" / "home"
    before = os.umask(0)
    try:
        ingest(documents, home, model)
    finally:
        os.umask(before)
    assert {
        path.stat().st_mode & 0o777 for path in (home, *home.parents) if path.is_relative_to(tmp_path / "far above")
    } == {0o700}


def test_without_llama_index_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cacheclip_app.folder", None)
    result = run("ask", "x")
    assert result.exit_code == 2 and "pip install 'cacheclip-rag[app]'" in result.stderr
    for command in ("ingest", "ask"):
        assert run(command, "--help").exit_code == 0
