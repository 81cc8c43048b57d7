"""A report at a terminal, with rich. Texts of documents lose their control characters: they could steer a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from . import summary as story
from .html import STAGE_COLOURS
from .plot import plain
from .token_sources import Fate

if TYPE_CHECKING:
    from .record import Report

WIDTH = 60
"""Characters of a bar."""


def renderables(report: Report) -> Iterator[RenderableType]:
    """Headline, bars, chunks, and why anything missed. The prompt itself is left to the notebook."""
    yield Text(f"{report.method}: {story.headline(report)}", style="bold")
    if told := story.comparison(report):
        yield Text(told)
    yield from _times(report)
    yield from _strip(report)
    if report.chunks:
        yield _chunks(report)
    for reason in story.reasons(report):
        yield Text(f"! {plain(reason)}", style="magenta")


def _times(report: Report) -> Iterator[Text]:
    parts, full = story.stages(report), story.full_prefill(report)
    if not parts:
        return
    longest = max(sum(parts.values()), full[0] if full else 0.0)
    bar, keys = Text("this request  "), Text("              ")
    for (stage, value), colour in zip(parts.items(), cycle(STAGE_COLOURS), strict=False):
        bar.append("█" * max(1, round(WIDTH * value / longest)), style=colour)
        keys.append("█ ", style=colour)
        keys.append(f"{stage} {story.seconds(value)}  ")
    yield bar.append(f" {story.seconds(report.ttft)}")
    if full:
        filled = "█" * max(1, round(WIDTH * full[0] / longest))
        label = "" if full[1] else " estimated"
        yield Text("full prefill  ").append(filled, style="#8f8f8f").append(f" {story.seconds(full[0])}{label}")
    yield keys


def _strip(report: Report) -> Iterator[Text]:
    """The prompt in `WIDTH` cells, each in the colour of the fate that most of its tokens had."""
    if report.fates is None or not report.fates.tokens:
        return
    cells: list[dict[Fate, float]] = [{} for _ in range(WIDTH)]
    scale = WIDTH / report.fates.tokens
    for run in report.fates.runs():
        left, right = run.row * scale, (run.row + run.tokens) * scale
        for cell in range(int(left), min(WIDTH, int(right) + 1)):
            share = min(right, cell + 1) - max(left, cell)
            cells[cell][run.fate] = cells[cell].get(run.fate, 0.0) + share
    strip = Text("prompt        ")
    for shares in cells:
        strip.append("█", style=story.COLOURS[max(shares, key=lambda fate: shares[fate])])
    yield strip.append(f" {report.fates.tokens:,} tokens")
    counts, keys = report.fates.counts(), Text("              ")
    for fate, name in story.NAMES.items():
        if counts[fate]:
            keys.append("█ ", style=story.COLOURS[fate]).append(f"{name} {counts[fate]:,}  ")
    yield keys


def _chunks(report: Report) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("", justify="right")
    table.add_column("chunk", overflow="ellipsis", no_wrap=True, max_width=44)
    for column in ("reused", "recomputed", "computed"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for number, use in enumerate(report.chunks, start=1):
        counts = (f"{count:,}" for count in (use.reused, use.recomputed, use.computed))
        table.add_row(
            str(number), Text(plain(story.title(report, use))), *counts, Text(plain(story.remark(use)), style="dim")
        )
    return table
