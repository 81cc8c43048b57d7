"""Runs systems over items, and appends a row for each answer to a JSONL file; it can be stopped and resumed."""

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
    """Answer every item with full prefill and with every system; returns the number of failed answers.

    Rows of an earlier run are kept and not repeated. If a system raises on an item, a row with ``error`` is written and
    the run continues; the next run tries it again. Rows are written one by one, so that stopping a run loses only the
    answer in progress.

    Full prefill runs once per item and is cached in the folder ``references`` (by default beside the rows). All systems
    are teacher-forced on its greedy answer for the KL, with both sides rounded to bfloat16.

    Raises `ConfigurationError` for two systems with one label, and for a file whose rows belong to another model or
    have another configuration, prompt or length under the same label.
    """
    path = Path(path)
    labels = ["full", *(system.label for system in systems)]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise ConfigurationError(f'two systems are called {", ".join(sorted(twice))} ("full" is always there)')
    if unplanned := [system.label for system in systems if system.context and system.plan is None]:
        raise ConfigurationError(
            f"{', '.join(unplanned)}: give `plan` (formerly `meet`), as `contexts.planner` makes it, or use "
            "cacheclip eval"
        )
    known_fields = [_known_fields(engine, system, max_new_tokens) | {"dataset": dataset} for system in [None, *systems]]
    rows.prepare(path)
    kept = rows.read(path, repair=True)
    _check_origin(path, kept.values(), known_fields[0])
    todo = []
    for item in items:
        text = prompt(item, engine.backbone)
        mine = {"id": item.id, "task": item.meta.get("task"), "prompt": digest(text)[:16]}
        wanted = [{**fields, **mine} for fields in known_fields]
        if wanted := [row for row in wanted if not _done(path, kept.get(rows.key(row)), row)]:
            todo.append((item, text, wanted))
    known = References(references or path.parent / "references", known_fields[0]["model"], max_new_tokens)
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


def _known_fields(engine: Engine, system: System | None, max_new_tokens: int) -> Row:
    """The fields of a system's rows that are known before it runs; ``system`` None stands for full prefill."""
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
