"""Runs systems over items and appends a row for each to a JSONL file, so that it can stop and go on at any time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from cacheclip_rag import spec
from cacheclip_rag.engine import Engine
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.methods import METHODS

from . import access, rows
from .answers import answers
from .data import Item, prompt
from .references import References, digest
from .rows import Row
from .systems import System


def run(
    engine: Engine,
    items: Sequence[Item],
    systems: Sequence[System],
    path: str | Path,
    *,
    dataset: str,
    max_new_tokens: int = 48,
    references: str | Path | None = None,
) -> int:
    """Answer every item with full prefill and with every system; the number of answers that failed.

    Rows of an earlier run are kept and not repeated. A system that raises on an item leaves a row with ``error`` and
    the run goes on; the next run tries it again. Rows are written one by one, so that whenever a run is stopped, the
    answer in work is all that is lost.

    Full prefill runs once an item and is kept in the folder ``references`` (by default beside the rows); its greedy
    answer is the text that all systems are teacher-forced on for the KL, both sides rounded to bfloat16.

    Raises ConfigurationError for two systems of one label, and for a file whose rows belong to another model or were
    made with another configuration, prompt or length under the same label.
    """
    path = Path(path)
    labels = ["full", *(system.label for system in systems)]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ConfigurationError(f'two systems are called {", ".join(sorted(twice))} ("full" is always there)')
    if unmet := [system.label for system in systems if system.context and system.meet is None]:
        raise ConfigurationError(
            f"{', '.join(unmet)}: give `meet`, as `context.meeting` makes it, or use cacheclip eval"
        )
    heads = [_head(engine, system, max_new_tokens) | {"dataset": dataset} for system in [None, *systems]]
    rows.prepare(path)
    kept = rows.read(path, repair=True)
    _check_origin(path, kept.values(), heads[0])
    todo = []
    for item in items:
        text = prompt(item, engine.backbone)
        mine = {"id": item.id, "task": item.meta.get("task"), "prompt": digest(text)[:16]}
        wanted = [{**head, **mine} for head in heads]
        if wanted := [row for row in wanted if not _done(path, kept.get(rows.key(row)), row)]:
            todo.append((item, text, wanted))
    known = References(references or path.parent / "references", heads[0]["model"], max_new_tokens)
    by_label = {system.label: system for system in systems}
    failed, own = 0, engine.auxiliary
    try:
        with path.open("a", encoding="utf-8") as file:
            for item, text, wanted in tqdm(todo, desc=dataset, initial=len(items) - len(todo), total=len(items)):
                for row in answers(engine, item, text, wanted, by_label, known, own):
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    failed += "error" in row
    finally:
        engine.auxiliary = own
    return failed


def _head(engine: Engine, system: System | None, max_new_tokens: int) -> Row:
    """What a row says before anything ran. None stands for full prefill."""
    method = METHODS["full"] if system is None else system.recipe
    auxiliary = (system and system.auxiliary) or engine.auxiliary if method.select.needs_auxiliary else None
    ratio = None if system is None else system.ratio
    return {
        "model": access.identity(engine.library.namespace),
        "auxiliary": auxiliary and access.identity(auxiliary.library.namespace),
        "version": access.version(),
        "system": "full" if system is None else system.label,
        "method": spec.describe(method),
        "requested_ratio": method.recompute_ratio if ratio is None else ratio,
        "max_new_tokens": max_new_tokens,
    }


def _check_origin(path: Path, kept: Iterable[Row], wanted: Row) -> None:
    for row in kept:
        for name in ("model", "version"):
            if row.get(name) != wanted[name]:
                raise ConfigurationError(
                    f"{path}: the row of {row['dataset']}, {row['id']}, {row['system']} belongs to another {name} "
                    f"({row.get(name)}, now {wanted[name]}): choose another file"
                )


def _done(path: Path, kept: Row | None, wanted: Row) -> bool:
    if kept is None or "error" in kept:
        return False
    if name := rows.differs(kept, wanted):
        raise ConfigurationError(
            f"{path}: {kept['dataset']}, {kept['id']} was answered by {kept['system']} with another {name} "
            f"({kept[name]}, now {wanted[name]}): choose another file or label"
        )
    return True
