"""What a report has to tell, in the order and the words in which every kind of picture tells it."""

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
"""The token_sources by the name they are shown under, cached ones first."""

MEANINGS = {
    TokenSource.PREFIX: "the beginning of the prompt, kept from an earlier request",
    TokenSource.IN_PLACE: "stored KV right behind the prefix it was encoded behind: nothing to repair",
    TokenSource.REUSED: "stored KV as it is",
    TokenSource.ADJUSTED: "stored KV, moved by what recomputing changed in its chunk: not computed",
    TokenSource.RECOMPUTED: "had stored KV and was refreshed",
    TokenSource.EDGE: "inside a chunk, cut differently by the tokenizer: computed",
    TokenSource.FRESH: "computed: question, template, unknown text",
}

COLOURS = {
    TokenSource.PREFIX: "#1b9e77",
    TokenSource.IN_PLACE: "#56b4e9",
    TokenSource.REUSED: "#4477aa",
    TokenSource.ADJUSTED: "#88ccee",
    TokenSource.RECOMPUTED: "#e69f00",
    TokenSource.EDGE: "#cc79a7",
    TokenSource.FRESH: "#8f8f8f",
}
"""Told apart with any colour vision, on light and on dark ground."""

STAGE_COLOURS = ("#56b4e9", "#cc79a7", "#1b9e77", "#f0e442", "#d55e00", "#4477aa", "#8f8f8f")
"""One after the other, of the stages of a request."""


@dataclass(frozen=True)
class Piece:
    """A stretch of the prompt: text between chunks (``use`` is None) or one known chunk, run by run."""

    use: ChunkUse | None
    runs: tuple[Run, ...]


def headline(report: Record) -> str:
    """The request in half a line."""
    text = f"{report.cached_tokens:,} of {report.prompt_tokens:,} prompt tokens from cache"
    if report.recomputed:
        text += f", {report.recomputed:,} recomputed ({report.ratio:.0%})"
    return f"{text}, first token after {seconds(report.ttft)}"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.1f} ms"


def stages(report: Record) -> dict[str, float]:
    """Seconds to the first token by stage, in order; ``other`` is what no stage accounts for. Nothing under 0.5 %."""
    parts = dict(report.seconds)
    parts["other"] = report.ttft - sum(parts.values())
    least = 0.005 * max(report.ttft, sum(report.seconds.values()))
    return {stage: value for stage, value in parts.items() if value > least}


def full_prefill(report: Record) -> tuple[float, bool] | None:
    """Seconds a full prefill takes, and whether they were measured; None where there is nothing to compare.

    Not measured, they are what this request's own recompute stage took a token, times the prompt's tokens. On two CPU
    cores that came out 9 and 15 % above what was measured (benchmarks/results/speed.jsonl).
    """
    if report.full_prefill is not None:
        return report.full_prefill, True
    work = report.seconds.get("recompute", 0.0)
    if not work or not report.cached_tokens or not report.computed_tokens:
        return None
    return work * report.prompt_tokens / report.computed_tokens, False


def comparison(report: Record) -> str:
    """How many times faster to the first token than a full prefill, or nothing to say."""
    full = full_prefill(report)
    if full is None or not report.ttft:
        return ""
    times, about = full[0] / report.ttft, "" if full[1] else "about "
    if times >= 1.05:
        return f"{about}{times:.1f}x faster to the first token than a full prefill ({about}{seconds(full[0])})"
    return f"no faster to the first token than a full prefill ({about}{seconds(full[0])})"


def pieces(report: Record) -> Iterator[Piece]:
    """The prompt in order, cut at the borders of its chunks. A token belongs where its first character stands."""
    if report.token_sources is None:
        return
    uses = sorted(report.chunks, key=lambda use: use.start)
    for use, runs in groupby(report.token_sources.runs(), key=lambda run: _around(uses, run)):
        yield Piece(use, tuple(runs))


def _around(uses: list[ChunkUse], run: Run) -> ChunkUse | None:
    number = bisect_right(uses, run.start, key=lambda use: use.start) - 1
    return uses[number] if number >= 0 and run.start < uses[number].end else None


def title(report: Record, use: ChunkUse) -> str:
    """What a chunk is called: its source where it is known, else how it begins."""
    if use.key in report.sources:
        return report.sources[use.key]
    text = (
        ""
        if report.token_sources is None
        else " ".join(report.token_sources.prompt[use.start : min(use.end, use.start + 200)].split())
    )
    return (text[:60] + "..." if len(text) > 60 else text) or use.key[:12]


def remark(use: ChunkUse) -> str:
    """What is out of the ordinary with a chunk, if anything."""
    remarks = []
    if use.missing:
        remarks.append(f"prefilled: {use.missing}")
    if not use.whole:
        remarks.append("only a part of it stands here")
    if use.in_place:
        remarks.append("in place: right behind the prefix it was encoded behind")
    return "; ".join(remarks)


def reasons(report: Record) -> list[str]:
    """Why tokens were computed that are not the question's, and what went wrong; empty when there is nothing to say."""
    found = list(report.fallbacks)
    if report.edges:
        found.append(f"{report.edges:,} tokens at chunk edges were cut differently by the tokenizer than when stored")
    parts = sum(not use.whole for use in report.chunks)
    if parts:
        found.append(f"{parts} chunks stand in the prompt only in part: what was cut off a chunk is not missed")
    if reason := nothing_known(report):
        found.append(reason)
    return found


def nothing_known(report: Record) -> str:
    """Why no chunk was reused where none was found; empty where there is another reason, or nothing to say."""
    reused = report.chunks or report.reused or report.prefix > report.fresh
    if reused or report.fallbacks or report.requested_ratio >= 1:
        return ""
    return "no chunk in this prompt has stored KV: it was not ingested, or its text was changed on the way"


def plain(text: str) -> str:
    """Without characters that are none to be seen, or that steer a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)
