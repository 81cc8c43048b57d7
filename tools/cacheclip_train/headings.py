"""Questions from the headings of Markdown and reStructuredText documents, for trainings that need no answers."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cacheclip_eval.data import Item, Passage
from cacheclip_eval.sources import Source

from cacheclip_rag.errors import ConfigurationError

SUFFIXES = (".md", ".markdown", ".rst")
_LEAST, _MOST = 200, 1500
"""Characters of a section that is a passage; a longer one is cut at the end of a line."""

_HASHES = re.compile(r"#{1,6}[ \t]+(.+?)[ \t]*#*$")
_RULE = re.compile(r"([=\-~^\"'`*+#:.])\1{2,}$")
_FENCE = re.compile(r"[ \t]*(```|~~~)")


@dataclass(frozen=True)
class Headings:
    """A folder of documents as a data set: each heading is a question about the text below it.

    The text stands, without its heading, beside ``passages - 1`` other sections, half of them of the same document;
    ``seed``: of which ones. A document without two sections of 200 characters has no question.
    """

    folder: Path
    passages: int = 4
    seed: int = 0

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def path(self) -> Path:
        return self.folder

    def all(self) -> list[Item]:
        """The items, in the order of the files' names. Raises `ConfigurationError` for files that are no UTF-8 text."""
        documents, items, chosen = [], list[Item](), random.Random(self.seed)
        for file in _files(self.folder):
            try:
                documents.append((file.relative_to(self.folder).as_posix(), *split(file.read_text(encoding="utf-8"))))
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"{file} cannot be read: {error}") from error
        sections = [Passage(name, text) for name, _, found in documents for _, text in found]
        for name, title, found in documents:
            for number, (heading, text) in enumerate(found if len(found) > 1 else []):
                near = [one for one in sections if one.title == name and one.text != text]
                near = chosen.sample(near, min(len(near), (self.passages - 1) // 2))
                far = [one for one in sections if one.title != name]
                far = chosen.sample(far, min(len(far), self.passages - 1 - len(near)))
                passages = [Passage(name, text, True), *near, *far]
                chosen.shuffle(passages)
                question = heading if heading.endswith("?") else f"What does {title} say about: {heading}?"
                items.append(Item(f"{name}#{number}", question, (), tuple(passages)))
        return items


def source(spec: str) -> Source | Headings | None:
    """The data set of ``spec``, ``FOLDER`` or ``FOLDER?passages=4``, if that is a folder of documents and of no
    questions; else None. Raises `ConfigurationError` for another condition.
    """
    path, asks, condition = spec.partition("?")
    folder = Path(path)
    if not folder.is_dir() or (folder / "qa.jsonl").exists() or not _files(folder):
        return None
    key, _, count = condition.partition("=")
    if not asks:
        return Headings(folder)
    if key != "passages" or not count.isdecimal() or int(count) < 2:
        raise ConfigurationError(f"{spec}: of a folder of documents write ?passages=4, 2 or more, and nothing else")
    return Headings(folder, int(count))


def split(text: str) -> tuple[str, list[tuple[str, str]]]:
    """A document's title (its first heading), and its sections long enough to be passages: heading and text."""
    sections = [(heading, "\n".join(lines).strip()) for heading, lines in _sections(text.splitlines())]
    title = next((heading for heading, _ in sections if heading), "the document")
    return title, [(heading, _cut(body)) for heading, body in sections if heading and len(body) >= _LEAST]


def _sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    heading, body, fenced, number = "", list[str](), False, 0
    while number < len(lines):
        line, below = lines[number], lines[number + 1] if number + 1 < len(lines) else ""
        found, skip = None, 1
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced and (hashes := _HASHES.match(line)):
            found = hashes[1]
        elif not fenced and _underlined(line, below):
            found, skip = line.strip(), 2
        if found is None:
            body.append(line)
        else:
            if body and _RULE.match(body[-1]):  # reStructuredText draws a rule above a title, too
                body.pop()
            yield heading, body
            heading, body = found, []
        number += skip
    yield heading, body


def _underlined(line: str, below: str) -> bool:
    text = line.strip()
    return bool(text) and not _RULE.match(text) and bool(_RULE.match(below)) and len(below.rstrip()) >= len(text)


def _cut(text: str) -> str:
    if len(text) <= _MOST:
        return text
    cut = text.rfind("\n", _LEAST, _MOST)
    return text[: cut if cut > 0 else _MOST].rstrip()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
