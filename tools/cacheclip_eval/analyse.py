"""The command ``cacheclip analyse``: one question, one figure, and its numbers as JSONL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cacheclip_rag.engine import Engine
from cacheclip_rag.errors import ConfigurationError

from . import figures, plots, rows
from .analyses import agreement, deviation
from .data import Item
from .hits import hits
from .sources import sources

FROM_ROWS = ("pareto", "sweep", "length")
MEASURES = ("kl", "score", "adjusted", "agree")
FROM_MODEL = {"agreement": plots.agreement, "deviation": plots.deviation, "hits": plots.hits}


def answer(
    question: str,
    data: Sequence[str],
    kept: Path | None,
    figure: Path,
    model: str,
    auxiliaries: Sequence[str],
    method: str,
    by: str,
    measure: str,
    count: int,
) -> Iterator[str]:
    """Draw ``figure``, and write its numbers to the same name with ``.jsonl``; yields lines to print.

    Raises `ConfigurationError` for an unknown question, for missing rows or data, for a path that cannot be written
    to, and for missing matplotlib.
    """
    try:
        figure.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{figure} cannot be written: {error}") from error
    if figure.suffix not in plots.FORMATS:
        raise ConfigurationError(f"{figure}: a figure ends in {', '.join(plots.FORMATS)}")
    if measure not in MEASURES:
        raise ConfigurationError(f'unknown measure "{measure}"; there are: {", ".join(MEASURES)}')
    if question in FROM_ROWS:
        if kept is None:
            raise ConfigurationError(f"{question} draws rows of cacheclip eval: --rows FILE")
        _draw(question, kept, figure, by, measure)
        yield f"{figure}"
    elif question in FROM_MODEL:
        if not data:
            raise ConfigurationError(f"{question} needs a data set: FILE, FOLDER or ruler:TASK:TOKENS")
        found = sources(data)
        with Engine(model, method="naive") as engine:
            items = [item for source in found for item in source.items(count, engine.backbone)]
            numbers = list(_measured(question, engine, items, auxiliaries, method))
        file = figure.with_suffix(".jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in numbers), encoding="utf-8")
        yield f"{file}"
        FROM_MODEL[question](numbers, figure)
        yield f"{figure}"
        if question == "hits":
            yield from _hit_shares(numbers)
    else:
        raise ConfigurationError(f'unknown question "{question}"; there are: {", ".join((*FROM_MODEL, *FROM_ROWS))}')


def _measured(
    question: str, engine: Engine, items: Sequence[Item], auxiliaries: Sequence[str], method: str
) -> Iterable[dict[str, Any]]:
    if question == "hits":
        return hits(engine.backbone, items)
    if question == "deviation":
        return _each(items, lambda item: deviation(engine, [item], method))
    helpers = {name: engine.open_auxiliary(name) for name in auxiliaries}
    return _each(items, lambda item: agreement(engine, [item], helpers))


def _each(items: Sequence[Item], measure: Callable[[Item], Iterable[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    for item in tqdm(items):
        yield from measure(item)


def _draw(question: str, kept: Path, figure: Path, by: str, measure: str) -> None:
    if question == "length" and measure == "adjusted":
        raise ConfigurationError("adjusted is of all items together: length draws kl, score or agree")
    records = figures.summary(kept)
    if not records:
        raise ConfigurationError(f"{kept} holds no rows")
    if question == "pareto":
        plots.pareto(records, figure, measure)
    elif question == "sweep":
        plots.sweep(records, figure, by or "ratio", measure)
    else:
        good = [row for row in rows.read(kept).values() if "error" not in row]
        plots.length(good, figure, by or "prompt_tokens", measure)


def _hit_shares(numbers: Sequence[dict[str, Any]]) -> Iterator[str]:
    for method in dict.fromkeys(row["method"] for row in numbers):
        mine = [row for row in numbers if row["method"] == method]
        share = sum(row["found"] for row in mine) / sum(row["prompt_tokens"] for row in mine)
        yield f"{method}: {share:.1%} of the prompt tokens of {len(mine)} questions were cached"
