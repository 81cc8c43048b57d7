"""Fills generated tables into Markdown pages whose text is written by hand.

The table NAME is inserted between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
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
"""Renamed parameters, whose former names older rows have in their labels."""


def fill(pages: Iterable[Path], tables: Mapping[str, str], *, check: bool = False) -> list[Path]:
    """Insert each table between its markers. Returns the pages that this changed, or, with ``check``, would change.

    Raises ValueError for a marker without a table, and for a table without a marker.
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
    """A system's label with the current names of parameters, sorted."""
    head, colon, rest = label.partition(":")
    if not colon:
        return label
    parts = (part.partition("=") for part in spec.split(rest))
    return f"{head}:{','.join(sorted(f'{_RENAMED.get(name, name)}={value}' for name, _, value in parts))}"


def copies(names: Iterable[str], folder: Path) -> dict[str, Path]:
    """Copies of committed rows in ``folder``, with current labels, by name; missing files are skipped."""
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
