"""A report at a terminal, with rich. Documents are shown without control characters, which could control a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from . import summary
from .token_sources import TokenSource

if TYPE_CHECKING:
    from .record import Record

WIDTH = 60
"""Width of a bar in characters."""


def renderables(report: Record) -> Iterator[RenderableType]:
    """Headline, bars, chunks and reasons for cache misses. Only the notebook shows the prompt itself."""
    yield Text(f"{report.method}: {summary.headline(report)}", style="bold")
    if faster := summary.comparison(report):
        yield Text(faster)
    yield from _times(report)
    yield from _strip(report)
    if report.chunks:
        yield _chunks(report)
    for reason in summary.reasons(report):
        yield Text(f"! {summary.plain(reason)}", style="magenta")


def _times(report: Record) -> Iterator[Text]:
    parts, full = summary.stages(report), summary.full_prefill(report)
    if not parts:
        return
    longest = max(sum(parts.values()), full[0] if full else 0.0)
    bar, keys = Text("this request  "), Text("              ")
    for (stage, value), colour in zip(parts.items(), cycle(summary.STAGE_COLOURS), strict=False):
        bar.append("█" * max(1, round(WIDTH * value / longest)), style=colour)
        keys.append("█ ", style=colour)
        keys.append(f"{stage} {summary.seconds(value)}  ")
    yield bar.append(f" {summary.seconds(report.ttft)}")
    if full:
        filled = "█" * max(1, round(WIDTH * full[0] / longest))
        label = "" if full[1] else " estimated"
        yield Text("full prefill  ").append(filled, style="#8f8f8f").append(f" {summary.seconds(full[0])}{label}")
    yield keys


def _strip(report: Record) -> Iterator[Text]:
    """The prompt in `WIDTH` cells, each in the colour of its tokens' most frequent source."""
    if report.token_sources is None or not report.token_sources.tokens:
        return
    cells: list[dict[TokenSource, float]] = [{} for _ in range(WIDTH)]
    scale = WIDTH / report.token_sources.tokens
    for run in report.token_sources.runs():
        left, right = run.row * scale, (run.row + run.tokens) * scale
        for cell in range(int(left), min(WIDTH, int(right) + 1)):
            share = min(right, cell + 1) - max(left, cell)
            cells[cell][run.source] = cells[cell].get(run.source, 0.0) + share
    strip = Text("prompt        ")
    for shares in cells:
        strip.append("█", style=summary.COLOURS[max(shares, key=lambda source: shares[source])])
    yield strip.append(f" {report.token_sources.tokens:,} tokens")
    counts, keys = report.token_sources.counts(), Text("              ")
    for source, name in summary.NAMES.items():
        if counts[source]:
            keys.append("█ ", style=summary.COLOURS[source]).append(f"{name} {counts[source]:,}  ")
    yield keys


def _chunks(report: Record) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("", justify="right")
    table.add_column("chunk", overflow="ellipsis", no_wrap=True, max_width=44)
    for column in ("reused", "recomputed", "computed"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for number, use in enumerate(report.chunks, start=1):
        counts = (f"{count:,}" for count in (use.reused, use.recomputed, use.computed))
        table.add_row(
            str(number),
            Text(summary.plain(summary.title(report, use))),
            *counts,
            Text(summary.plain(summary.remark(use)), style="dim"),
        )
    return table
