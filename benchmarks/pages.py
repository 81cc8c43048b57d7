"""Markdown pages with generated tables: the words are written by hand, the tables are filled in between two comments.

A table called NAME stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from cacheclip_rag import spec

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"

_BLOCK = re.compile(r"(<!-- begin ([\w-]+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
_RENAMED = {"company": "context", "window": "group_size"}
"""Parameters that rows made before they were renamed still have in their labels."""


def fill(pages: Iterable[Path], tables: Mapping[str, str], *, check: bool = False) -> list[Path]:
    """Put each table between its markers. Returns the pages that this changed, or, with ``check``, would change.

    Raises ValueError for a marker without a table, and for a table that no page has a place for.
    """
    changed, placed = [], set()
    for page in pages:
        text = page.read_text(encoding="utf-8")
        names = [found[1] for found in _BLOCK.findall(text)]
        if unknown := [name for name in names if name not in tables]:
            raise ValueError(f"{page}: no table {', '.join(unknown)}")
        placed.update(names)
        filled = _BLOCK.sub(lambda found: f"{found[1]}{tables[found[2]].strip()}\n{found[3]}", text)
        if filled != text:
            changed.append(page)
            if not check:
                page.write_text(filled, encoding="utf-8")
    if lost := sorted(set(tables) - placed):
        raise ValueError(f"no page has a place for {', '.join(lost)}")
    return changed


def relabelled(label: str) -> str:
    """A system's label with the parameters' names of today, in alphabetical order."""
    head, colon, rest = label.partition(":")
    if not colon:
        return label
    parts = (part.partition("=") for part in spec.split(rest))
    return f"{head}:{','.join(sorted(f'{_RENAMED.get(name, name)}={value}' for name, _, value in parts))}"


def copies(names: Iterable[str], folder: Path) -> dict[str, Path]:
    """Committed rows with today's labels, copied into ``folder``; those that were never made are left out."""
    found = {}
    for name in names:
        if not (path := RESULTS / f"{name}.jsonl").exists():
            continue
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found[name] = folder / path.name
        found[name].write_text(
            "".join(f"{json.dumps(row | {'system': relabelled(row['system'])})}\n" for row in rows), encoding="utf-8"
        )
    return found
