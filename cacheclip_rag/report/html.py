"""A report as HTML for notebooks: one element with its own style, without scripts, for light and dark themes.

Documents are untrusted, so every text goes through `html.escape`, into element content and quoted attributes only.
"""

from __future__ import annotations

from functools import cache
from html import escape
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from . import summary
from .token_sources import Run, TokenSource

if TYPE_CHECKING:
    from .record import Record


def html(report: Record) -> str:
    """The report as one HTML element; some 100 bytes per run of tokens."""
    body = [f"<h4>{escape(report.method)}: {escape(summary.headline(report))}</h4>"]
    if faster := summary.comparison(report):
        body.append(f"<p>{escape(faster)}</p>")
    body += [_times(report), _strip(report), _legend(report), _why(report), _chunks(report), _prompt(report)]
    return f'<div class="ccr"><style>{_style()}</style>{"".join(body)}</div>'


@cache
def _style() -> str:
    token_sources = "".join(
        f".ccr .f{int(source)}{{background:color-mix(in srgb,{colour} var(--mix),transparent)}}"
        for source, colour in summary.COLOURS.items()
        if source is not TokenSource.FRESH
    )
    lines = ".ccr .f3{text-decoration:underline #e69f00}.ccr .f1{text-decoration:underline dotted #cc79a7}"
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8") + token_sources + lines


def _times(report: Record) -> str:
    """Two bars on one scale: this request by stage, and a full prefill."""
    parts, full = summary.stages(report), summary.full_prefill(report)
    if not parts:
        return ""
    longest = max(sum(parts.values()), full[0] if full else 0.0)
    bars = [
        f'<i style="width:{100 * value / longest:.2f}%;background:{colour}" '
        f'title="{escape(stage)} {summary.seconds(value)}"></i>'
        for (stage, value), colour in zip(parts.items(), cycle(summary.STAGE_COLOURS), strict=False)
    ]
    text = _row("this request", "".join(bars), summary.seconds(report.ttft))
    if full:
        label = "full prefill" if full[1] else "full prefill, est."
        bar = f'<i style="width:{100 * full[0] / longest:.2f}%;background:#8f8f8f"></i>'
        text += _row(label, bar, summary.seconds(full[0]))
    keys = "".join(
        f'<span class="key"><b style="background:{colour}"></b>{escape(stage)} {summary.seconds(value)}</span>'
        for (stage, value), colour in zip(parts.items(), cycle(summary.STAGE_COLOURS), strict=False)
    )
    return f"{text}<div>{keys}</div>"


def _row(label: str, bars: str, number: str) -> str:
    return (
        f'<div class="row"><span>{label}</span><span class="bar">{bars}</span><span class="num">{number}</span></div>'
    )


def _strip(report: Record) -> str:
    """The prompt's tokens as a strip: one path per token source, and a tick where a chunk begins."""
    if report.token_sources is None or not report.token_sources.tokens:
        return ""
    paths: dict[TokenSource, list[str]] = {source: [] for source in summary.NAMES}
    for run in report.token_sources.runs():
        paths[run.source].append(f"M{run.row} 0h{run.tokens}v20h-{run.tokens}z")
    drawn = [f'<path fill="{summary.COLOURS[source]}" d="{"".join(d)}"/>' for source, d in paths.items() if d]
    starts = [next(iter(piece.runs)) for piece in summary.pieces(report) if piece.use is not None]
    width = report.token_sources.tokens
    ticks = "".join(f"M{run.row} 0v24" for run in starts)
    return (
        f'<svg viewBox="0 0 {width} 24" preserveAspectRatio="none" role="img" aria-label="the prompt, token by token">'
        f'{"".join(drawn)}<path d="{ticks}" stroke="var(--fg)" vector-effect="non-scaling-stroke" fill="none"/></svg>'
    )


def _legend(report: Record) -> str:
    if report.token_sources is None:
        return ""
    counts = report.token_sources.counts()
    return (
        "<div>"
        + "".join(
            f'<span class="key" title="{escape(summary.MEANINGS[source])}">'
            f'<b style="background:{summary.COLOURS[source]}"></b>'
            f"{name} {counts[source]:,}</span>"
            for source, name in summary.NAMES.items()
            if counts[source]
        )
        + "</div>"
    )


def _why(report: Record) -> str:
    found = summary.reasons(report)
    if not found:
        return ""
    return f'<div class="why"><ul>{"".join(f"<li>{escape(reason)}</li>" for reason in found)}</ul></div>'


def _chunks(report: Record) -> str:
    if not report.chunks:
        return ""
    rows = "".join(
        f'<tr><td class="num">{number}</td><td class="src">{escape(summary.title(report, use))}</td>'
        f"{''.join(_number(count) for count in (use.reused, use.recomputed, use.computed))}"
        f"<td>{escape(summary.remark(use))}</td></tr>"
        for number, use in enumerate(report.chunks, start=1)
    )
    header = "<th></th><th>chunk</th>" + "".join(
        f'<th class="num">{name}</th>' for name in ("reused", "recomputed", "computed")
    )
    return f"<table><thead><tr>{header}<th></th></tr></thead><tbody>{rows}</tbody></table>"


def _number(count: int) -> str:
    return f'<td class="num">{count:,}</td>'


def _prompt(report: Record) -> str:
    if report.token_sources is None:
        return ""
    prompt, parts, number = report.token_sources.prompt, [], 0
    for piece in summary.pieces(report):
        text = "".join(_span(prompt, run) for run in piece.runs)
        if piece.use is None:
            parts.append(text)
            continue
        number += 1
        name = escape(f"{number}. {summary.title(report, piece.use)}")
        parts.append(f'<span class="chunk"><small>{name}</small>{text}</span>')
    return f'<details open><summary>the prompt</summary><div class="text">{"".join(parts)}</div></details>'


def _span(prompt: str, run: Run) -> str:
    text = escape(prompt[run.start : run.end])
    return (
        f"<span>{text}</span>" if run.source is TokenSource.FRESH else f'<span class="f{int(run.source)}">{text}</span>'
    )
