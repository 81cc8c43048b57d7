"""A report as a matplotlib figure."""

from __future__ import annotations

import io
from itertools import cycle
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from . import summary
from .token_sources import TokenSource

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .record import Record


def figure(report: Record) -> Figure:
    """A figure of the time by stage, the source of each token, and the reused tokens of each chunk.

    Raises `ConfigurationError` without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("figures need matplotlib: pip install 'cacheclip-rag[plots]'") from error

    class Shown(Figure):
        """A figure that a notebook displays even if pyplot was not imported."""

        def _repr_png_(self) -> bytes:
            drawn = io.BytesIO()
            self.savefig(drawn, format="png")
            return drawn.getvalue()

    heights = [1.1, 0.7, 0.4 + 0.28 * len(report.chunks)]
    drawn = Shown(figsize=(9, sum(heights) + 1.4), layout="constrained")
    times, strip, chunks = drawn.subplots(3, 1, height_ratios=heights)
    drawn.suptitle(f"{report.method}: {summary.headline(report)}", fontsize=10)
    _times(times, report)
    _strip(strip, report)
    _chunks(chunks, report)
    return drawn


def _times(axis: Any, report: Record) -> None:
    left, full = 0.0, summary.full_prefill(report)
    for (stage, value), colour in zip(summary.stages(report).items(), cycle(summary.STAGE_COLOURS), strict=False):
        axis.barh("this request", value, left=left, color=colour, label=f"{stage} {summary.seconds(value)}")
        left += value
    if full:
        axis.barh("full prefill" if full[1] else "full prefill, est.", full[0], color="#8f8f8f")
    axis.invert_yaxis()
    axis.set_xlabel("seconds to the first token", fontsize=8)
    axis.tick_params(labelsize=8)
    if report.seconds:
        axis.legend(fontsize=7, ncols=7, loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)


def _strip(axis: Any, report: Record) -> None:
    axis.set_yticks([])
    axis.tick_params(labelsize=8)
    axis.set_xlabel("prompt token", fontsize=8)
    if report.token_sources is None:
        return
    bars: dict[TokenSource, list[tuple[float, float]]] = {}
    for run in report.token_sources.runs():
        bars.setdefault(run.source, []).append((run.row, run.tokens))
    counts = report.token_sources.counts()
    for source in (source for source in summary.NAMES if source in bars):
        label = f"{summary.NAMES[source]} {counts[source]:,}"
        axis.broken_barh(bars[source], (0, 1), facecolors=summary.COLOURS[source], label=label)
    axis.set_xlim(0, report.token_sources.tokens)
    for piece in summary.pieces(report):
        if piece.use is not None:
            axis.axvline(piece.runs[0].row, color="black", linewidth=0.8)
    axis.legend(fontsize=7, ncols=6, loc="upper center", bbox_to_anchor=(0.5, 1.75), frameon=False)


def _chunks(axis: Any, report: Record) -> None:
    if not report.chunks:
        axis.set_axis_off()
        return
    # matplotlib must not interpret mathtext and control characters in a document's text
    names = [f"{n}. {summary.plain(summary.title(report, use))[:44]}" for n, use in enumerate(report.chunks, start=1)]
    left = [0] * len(names)
    for source, counts in (
        (TokenSource.REUSED, [use.reused for use in report.chunks]),
        (TokenSource.RECOMPUTED, [use.recomputed for use in report.chunks]),
        (TokenSource.FRESH, [use.computed for use in report.chunks]),
    ):
        axis.barh(range(len(names)), counts, left=left, color=summary.COLOURS[source])
        left = [a + b for a, b in zip(left, counts, strict=True)]
    axis.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel("tokens of each chunk", fontsize=8)
