"""The command ``cacheclip eval``: from its arguments to rows and tables."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from cacheclip_rag.corpus.neighbours import Embed
from cacheclip_rag.engine import Engine
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.kv.library import KVDtype

from . import rows
from .contexts import planner
from .data import Item
from .embedding import mean_pooling
from .figures import comparison, summary
from .runner import run
from .sources import Source, max_new_tokens, sources
from .systems import System, parse
from .tables import compare, summarise

FAILED, INTERRUPTED = 1, 130
"""Exit codes: some answers failed; stopped by Ctrl-C, as shells count it."""


@dataclass(frozen=True)
class Plan:
    """What to run. ``items``: at most, of each data set; ``length``: maximum tokens of an answer, None for the data
    set's own; ``kv_dtype``: the dtype of stored KV.
    """

    sources: Sequence[Source]
    systems: Sequence[System]
    model: str
    auxiliary: str
    out: Path
    items: int
    length: int | None = None
    references: Path | None = None
    store: Path | None = None
    kv_dtype: KVDtype = "auto"


def plan(
    data: Sequence[str],
    methods: Sequence[str],
    *,
    ratio: float | None = None,
    sweeps: Sequence[str] = (),
    model: str,
    auxiliary: str,
    out: Path,
    items: int,
    length: int | None = None,
    references: Path | None = None,
    store: Path | None = None,
    kv_dtype: str = "auto",
    baseline: str | None = None,
) -> Plan:
    """Check the arguments, before a model is loaded. Raises `ConfigurationError`."""
    if not data:
        raise ConfigurationError("give at least one data set, before the options: FILE, FOLDER or ruler:TASK:TOKENS")
    if kv_dtype not in get_args(KVDtype):
        raise ConfigurationError(f'--kv-dtype must be auto or int8, not "{kv_dtype}"')
    systems = parse(methods, ratio, sweeps)
    if kv_dtype != "auto":  # rows of both may stand in one file and be compared
        systems = [dataclasses.replace(system, label=f"{system.label}+{kv_dtype}") for system in systems]
    kept_in = cast(KVDtype, kv_dtype)
    found = Plan(sources(data), systems, model, auxiliary, out, items, length, references, store, kept_in)
    if not auxiliary and (
        needy := [s.label for s in found.systems if s.recipe.select.needs_auxiliary and not s.helper]
    ):
        raise ConfigurationError(f"{', '.join(needy)} need an auxiliary model: --auxiliary NAME")
    rows.prepare(out)
    labels = ["full", *(system.label for system in found.systems), *(system for _, _, system in rows.read(out))]
    if baseline is not None and baseline not in labels:
        raise ConfigurationError(f'no system is called "{baseline}"; there are: {", ".join(dict.fromkeys(labels))}')
    return found


def execute(plan: Plan) -> int:
    """Run a plan; 0, or `FAILED` or `INTERRUPTED`. Progress goes to stderr.

    Raises ConfigurationError for rows of another model or configuration, and what `Engine` raises.
    """
    helped = any(system.recipe.select.needs_auxiliary and not system.helper for system in plan.systems)
    failed = 0
    # Existing rows decide the maximum length of answers, which depends on the items.
    kept = rows.read(plan.out)
    begun = {data: row["max_new_tokens"] for (data, _, _), row in kept.items() if "max_new_tokens" in row}
    try:
        helper = plan.auxiliary if helped else None
        with Engine(plan.model, auxiliary=helper, store=plan.store, kv_dtype=plan.kv_dtype) as engine:
            systems = _helped(engine, plan.systems)
            for source in plan.sources:
                items = source.items(plan.items, engine.backbone)
                among = _with_plans(systems, source, items)
                failed += run(
                    engine,
                    items,
                    among,
                    plan.out,
                    dataset=source.name,
                    max_new_tokens=plan.length or begun.get(source.name) or max_new_tokens(items, engine.backbone),
                    references=plan.references,
                )
    except KeyboardInterrupt:
        print(f"stopped: {plan.out} keeps what is done, and the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    if failed:
        print(f"{failed} answers failed; {plan.out} says why, and the same command tries them again", file=sys.stderr)
    return FAILED if failed else 0


def _helped(engine: Engine, systems: Sequence[System]) -> list[System]:
    """The systems with their own auxiliary models, each loaded once."""
    loaded = {name: engine.open_auxiliary(name) for name in {s.helper for s in systems if s.helper}}
    return [dataclasses.replace(s, auxiliary=loaded[s.helper]) if s.helper else s for s in systems]


def _with_plans(systems: Sequence[System], source: Source, items: Sequence[Item]) -> list[System]:
    """The systems, with planners for those that fuse passages."""
    sought = {(s.context, s.neighbours) for s in systems if s.context}
    if not sought:
        return list(systems)
    corpus, more = source.all() or items, source.corpus()
    embed = _once(mean_pooling()) if any(context == "similar" for context, _ in sought) else _no_embedding
    plans = {(context, count): planner(context, count, corpus, more, embed) for context, count in sought}
    return [dataclasses.replace(s, plan=plans[s.context, s.neighbours]) if s.context else s for s in systems]


def _once(embed: Embed) -> Embed:
    """``embed`` with a cache: systems that differ in the number of neighbours embed the same passages."""
    remembered = functools.cache(lambda texts: embed(list(texts)))
    return lambda texts: remembered(tuple(texts))


def _no_embedding(texts: list[str]) -> list[list[float]]:
    raise ConfigurationError("nothing is embedded here")


def render(path: Path, baseline: str | None = None, as_json: bool = False) -> str:
    """The summary of a file of rows, and the differences from ``baseline``, in Markdown or JSON.

    Raises ConfigurationError for a file that holds something else, and for an unknown baseline.
    """
    if as_json:
        parts = {"summary": summary(path)} | ({"comparison": comparison(path, baseline)} if baseline else {})
        return json.dumps(parts, indent=1)
    return summarise(path) + ("\n" + compare(path, baseline) if baseline else "")
