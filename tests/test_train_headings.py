"""Questions from headings: which text each is about, and that a folder of documents can be trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
from cacheclip_train.headings import Headings, source, split
from test_tune import tune
from tiny import PASSAGES

from cacheclip_rag import ConfigurationError

LONG = " ".join(PASSAGES[:2])

MARKDOWN = f"""Preface, which no heading names. {LONG}

# The lighthouse

{LONG}

```
# a comment, and no heading
```

Why it was built
----------------

{PASSAGES[0]}

## Too short ##

Little.
"""

RST = f"""
==========
Port Ellery
==========

:Status: Final

Harbour
=======

{LONG}

- a list
- of things
-----------

Abandoned ideas?
~~~~~~~~~~~~~~~~
{PASSAGES[1]}
"""


def test_headings_of_both_formats():
    title, found = split(MARKDOWN)
    assert title == "The lighthouse"
    assert [heading for heading, _ in found] == ["The lighthouse", "Why it was built"]
    assert found[0][1].startswith(LONG) and "# a comment" in found[0][1] and found[1][1] == PASSAGES[0]
    title, found = split(RST.replace("==========\nPort Ellery\n==========", "===========\nPort Ellery\n==========="))
    assert title == "Port Ellery"
    assert [heading for heading, _ in found] == ["Harbour", "Abandoned ideas?"]
    assert found[1][1] == PASSAGES[1]


def folder(path: Path, documents: int = 5) -> Path:
    path.mkdir()
    for number in range(documents):
        text = "".join(f"# Part {n} of {number}\n\n{PASSAGES[(number + n) % 5]}\n\n{n}{number}\n\n" for n in range(3))
        (path / f"d{number}.md").write_text(text)
    (path / "notes.txt").write_text("no document of ours")
    return path


def test_a_section_is_asked_about_among_others_and_its_heading_is_in_none(tmp_path):
    items = Headings(folder(tmp_path / "docs"), passages=4).all()
    assert len(items) == 15 and items == Headings(tmp_path / "docs", passages=4).all()
    for item in items:
        [about] = [passage for passage in item.passages if passage.supporting]
        name, number = item.id.split("#")
        assert (
            about.title == name
            and item.question == f"What does Part 0 of {name[1]} say about: Part {number} of {name[1]}?"
        )
        assert len(item.passages) == len({passage.text for passage in item.passages}) == 4 and item.answers == ()
        assert sum(passage.title == name for passage in item.passages) == 2
        assert not any("Part" in passage.text for passage in item.passages)


def test_only_a_folder_of_documents_without_questions_is_one(tmp_path):
    docs = folder(tmp_path / "docs")
    assert source(str(docs)) == Headings(docs) and source(f"{docs}?passages=3") == Headings(docs, 3)
    (tmp_path / "empty").mkdir()
    assert source(str(tmp_path / "empty")) is None and source("nowhere") is None
    for wrong in ("?passages=1", "?kind=x", "?passages=many"):
        with pytest.raises(ConfigurationError, match=r"passages=4"):
            source(f"{docs}{wrong}")
    (docs / "qa.jsonl").touch()
    assert source(str(docs)) is None
    (tmp_path / "empty" / "x.md").write_bytes(b"# \xff\xfe")
    with pytest.raises(ConfigurationError, match=r"x\.md cannot be read"):
        Headings(tmp_path / "empty").all()


def test_a_selector_is_trained_on_documents_alone(tmp_path, stand_in):
    docs = folder(tmp_path / "docs")
    limits = ("--stop-documents", 1, "--report-documents", 1, "--epochs", 1, "--hours", 0)
    words = (docs, "--model", stand_in, "--auxiliary", stand_in, "--out", tmp_path / "out", *limits)
    code, said, errors = tune(*words, kind="head")
    assert code == 0 and "paused" in said, errors
    code, said, errors = tune(docs, "--model", stand_in, "--out", tmp_path / "blocks", kind="blocks")
    assert code == 2 and "qa.jsonl" in errors, "answers are needed there"
