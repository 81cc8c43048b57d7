"""What every display of a report has in common: names, colours, headline, comparison and remarks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from .token_sources import Run, TokenSource

if TYPE_CHECKING:
    from .record import ChunkUse, Record

NAMES = {
    TokenSource.PREFIX: "prefix",
    TokenSource.IN_PLACE: "in place",
    TokenSource.REUSED: "reused",
    TokenSource.ADJUSTED: "adjusted",
    TokenSource.RECOMPUTED: "recomputed",
    TokenSource.EDGE: "edge",
    TokenSource.FRESH: "fresh",
}
"""Display names of token sources, cached ones first."""

MEANINGS = {
    TokenSource.PREFIX: "prompt prefix, cached from an earlier request",
    TokenSource.IN_PLACE: "stored KV right behind the prefix it was encoded behind: needs no repair",
    TokenSource.REUSED: "stored KV, unchanged",
    TokenSource.ADJUSTED: "stored KV, adjusted by the change of recomputed tokens of its chunk: not computed",
    TokenSource.RECOMPUTED: "stored KV, recomputed",
    TokenSource.EDGE: "inside a chunk, but split differently by the tokenizer: computed",
    TokenSource.FRESH: "computed: question, template, unknown text",
}
"""Tooltips of token sources."""

COLOURS = {
    TokenSource.PREFIX: "#1b9e77",
    TokenSource.IN_PLACE: "#56b4e9",
    TokenSource.REUSED: "#4477aa",
    TokenSource.ADJUSTED: "#88ccee",
    TokenSource.RECOMPUTED: "#e69f00",
    TokenSource.EDGE: "#cc79a7",
    TokenSource.FRESH: "#8f8f8f",
}
"""Distinguishable with any colour vision, on light and dark backgrounds."""

STAGE_COLOURS = ("#56b4e9", "#cc79a7", "#1b9e77", "#f0e442", "#d55e00", "#4477aa", "#8f8f8f")
"""Colours of a request's stages, in order."""


@dataclass(frozen=True)
class Piece:
    """A piece of the prompt: one known chunk, or text between chunks (``use`` is None), as runs of tokens."""

    use: ChunkUse | None
    runs: tuple[Run, ...]


def headline(report: Record) -> str:
    """The request in half a line."""
    text = f"{report.cached_tokens:,} of {report.prompt_tokens:,} prompt tokens from cache"
    if report.recomputed:
        text += f", {report.recomputed:,} recomputed ({report.ratio:.0%})"
    return f"{text}, first token after {seconds(report.ttft)}"


def seconds(value: float) -> str:
    """A time in seconds, or in milliseconds below 0.1 s."""
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.1f} ms"


def stages(report: Record) -> dict[str, float]:
    """Seconds to the first token by stage, in order; ``other`` is the rest. Stages under 0.5 % are left out."""
    parts = dict(report.seconds)
    parts["other"] = report.ttft - sum(parts.values())
    least = 0.005 * max(report.ttft, sum(report.seconds.values()))
    return {stage: value for stage, value in parts.items() if value > least}


def full_prefill(report: Record) -> tuple[float, bool] | None:
    """Seconds of a full prefill, and whether they were measured; None if there is nothing to compare.

    The estimate is this request's time per computed token in the recompute stage, times the prompt's tokens. On two CPU
    cores it was 9 and 15 % above the measured time (benchmarks/results/speed.jsonl).
    """
    if report.full_prefill is not None:
        return report.full_prefill, True
    work = report.seconds.get("recompute", 0.0)
    if not work or not report.cached_tokens or not report.computed_tokens:
        return None
    return work * report.prompt_tokens / report.computed_tokens, False


def comparison(report: Record) -> str:
    """How many times faster to the first token than a full prefill, as a sentence; empty if unknown."""
    full = full_prefill(report)
    if full is None or not report.ttft:
        return ""
    times, about = full[0] / report.ttft, "" if full[1] else "about "
    if times >= 1.05:
        return f"{about}{times:.1f}x faster to the first token than a full prefill ({about}{seconds(full[0])})"
    return f"no faster to the first token than a full prefill ({about}{seconds(full[0])})"


def pieces(report: Record) -> Iterator[Piece]:
    """The prompt in order, split at the borders of its chunks. A token belongs to the piece of its first character."""
    if report.token_sources is None:
        return
    uses = sorted(report.chunks, key=lambda use: use.start)
    for use, runs in groupby(report.token_sources.runs(), key=lambda run: _around(uses, run)):
        yield Piece(use, tuple(runs))


def _around(uses: list[ChunkUse], run: Run) -> ChunkUse | None:
    number = bisect_right(uses, run.start, key=lambda use: use.start) - 1
    return uses[number] if number >= 0 and run.start < uses[number].end else None


def title(report: Record, use: ChunkUse) -> str:
    """A chunk's display name: its source, if known, else its first words."""
    if use.key in report.sources:
        return report.sources[use.key]
    text = (
        ""
        if report.token_sources is None
        else " ".join(report.token_sources.prompt[use.start : min(use.end, use.start + 200)].split())
    )
    return (text[:60] + "..." if len(text) > 60 else text) or use.key[:12]


def remark(use: ChunkUse) -> str:
    """A remark on a chunk that is missing, partial or in place; usually empty."""
    remarks = []
    if use.missing:
        remarks.append(f"prefilled: {use.missing}")
    if not use.whole:
        remarks.append("only a part of it is in the prompt")
    if use.in_place:
        remarks.append("in place: right behind the prefix it was encoded behind")
    return "; ".join(remarks)


def reasons(report: Record) -> list[str]:
    """Why chunk tokens were computed or reuse failed; empty if all went well."""
    found = list(report.fallbacks)
    if report.edges:
        found.append(f"{report.edges:,} tokens at chunk edges are split differently by the tokenizer than when stored")
    parts = sum(not use.whole for use in report.chunks)
    if parts:
        found.append(f"{parts} chunks are in the prompt only in part; the parts are reused")
    if reason := report.nothing_known:
        found.append(reason)
    return found


def plain(text: str) -> str:
    """``text`` with blanks for characters that are invisible or control a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)
