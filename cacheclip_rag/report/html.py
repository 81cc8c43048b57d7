"""A report as HTML for notebooks: one element with its style, without scripts, whatever theme it stands in.

Documents are untrusted: every text goes through `html.escape`, into element content and quoted attributes only.
"""

from __future__ import annotations

from functools import cache
from html import escape
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from . import summary as story
from .token_sources import Fate, Run

if TYPE_CHECKING:
    from .record import Report

STAGE_COLOURS = ("#56b4e9", "#cc79a7", "#1b9e77", "#f0e442", "#d55e00", "#4477aa", "#8f8f8f")


def html(report: Report) -> str:
    """The whole picture. Some 100 bytes a run of tokens, however many tokens the prompt has."""
    body = [f"<h4>{escape(report.method)}: {escape(story.headline(report))}</h4>"]
    if told := story.comparison(report):
        body.append(f"<p>{escape(told)}</p>")
    body += [_times(report), _strip(report), _legend(report), _why(report), _chunks(report), _prompt(report)]
    return f'<div class="ccr"><style>{_style()}</style>{"".join(body)}</div>'


@cache
def _style() -> str:
    fates = "".join(
        f".ccr .f{int(fate)}{{background:color-mix(in srgb,{colour} var(--mix),transparent)}}"
        for fate, colour in story.COLOURS.items()
        if fate is not Fate.FRESH
    )
    lines = ".ccr .f3{text-decoration:underline #e69f00}.ccr .f1{text-decoration:underline dotted #cc79a7}"
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8") + fates + lines


def _times(report: Report) -> str:
    """Two bars on one scale: this request by stage, and a full prefill."""
    parts, full = story.stages(report), story.full_prefill(report)
    if not parts:
        return ""
    longest = max(sum(parts.values()), full[0] if full else 0.0)
    bars = [
        f'<i style="width:{100 * value / longest:.2f}%;background:{colour}" '
        f'title="{escape(stage)} {story.seconds(value)}"></i>'
        for (stage, value), colour in zip(parts.items(), cycle(STAGE_COLOURS), strict=False)
    ]
    text = _row("this request", "".join(bars), story.seconds(report.ttft))
    if full:
        label = "full prefill" if full[1] else "full prefill, est."
        bar = f'<i style="width:{100 * full[0] / longest:.2f}%;background:#8f8f8f"></i>'
        text += _row(label, bar, story.seconds(full[0]))
    keys = "".join(
        f'<span class="key"><b style="background:{colour}"></b>{escape(stage)} {story.seconds(value)}</span>'
        for (stage, value), colour in zip(parts.items(), cycle(STAGE_COLOURS), strict=False)
    )
    return f"{text}<div>{keys}</div>"


def _row(label: str, bars: str, number: str) -> str:
    return (
        f'<div class="row"><span>{label}</span><span class="bar">{bars}</span><span class="num">{number}</span></div>'
    )


def _strip(report: Report) -> str:
    """All tokens in a row: one path a fate, and a tick where a chunk begins."""
    if report.fates is None or not report.fates.tokens:
        return ""
    paths: dict[Fate, list[str]] = {fate: [] for fate in story.NAMES}
    for run in report.fates.runs():
        paths[run.fate].append(f"M{run.row} 0h{run.tokens}v20h-{run.tokens}z")
    drawn = [f'<path fill="{story.COLOURS[fate]}" d="{"".join(d)}"/>' for fate, d in paths.items() if d]
    starts = [next(iter(piece.runs)) for piece in story.pieces(report) if piece.use is not None]
    width = report.fates.tokens
    ticks = "".join(f"M{run.row} 0v24" for run in starts)
    return (
        f'<svg viewBox="0 0 {width} 24" preserveAspectRatio="none" role="img" aria-label="the prompt, token by token">'
        f'{"".join(drawn)}<path d="{ticks}" stroke="var(--fg)" vector-effect="non-scaling-stroke" fill="none"/></svg>'
    )


def _legend(report: Report) -> str:
    if report.fates is None:
        return ""
    counts = report.fates.counts()
    return (
        "<div>"
        + "".join(
            f'<span class="key" title="{escape(story.MEANINGS[fate])}"><b style="background:{story.COLOURS[fate]}"></b>'
            f"{name} {counts[fate]:,}</span>"
            for fate, name in story.NAMES.items()
            if counts[fate]
        )
        + "</div>"
    )


def _why(report: Report) -> str:
    found = story.reasons(report)
    if not found:
        return ""
    return f'<div class="why"><ul>{"".join(f"<li>{escape(reason)}</li>" for reason in found)}</ul></div>'


def _chunks(report: Report) -> str:
    if not report.chunks:
        return ""
    rows = "".join(
        f'<tr><td class="num">{number}</td><td class="src">{escape(story.title(report, use))}</td>'
        f"{''.join(_number(count) for count in (use.reused, use.recomputed, use.computed))}"
        f"<td>{escape(story.remark(use))}</td></tr>"
        for number, use in enumerate(report.chunks, start=1)
    )
    head = "<th></th><th>chunk</th>" + "".join(
        f'<th class="num">{name}</th>' for name in ("reused", "recomputed", "computed")
    )
    return f"<table><thead><tr>{head}<th></th></tr></thead><tbody>{rows}</tbody></table>"


def _number(count: int) -> str:
    return f'<td class="num">{count:,}</td>'


def _prompt(report: Report) -> str:
    if report.fates is None:
        return ""
    prompt, parts, number = report.fates.prompt, [], 0
    for piece in story.pieces(report):
        text = "".join(_span(prompt, run) for run in piece.runs)
        if piece.use is None:
            parts.append(text)
            continue
        number += 1
        name = escape(f"{number}. {story.title(report, piece.use)}")
        parts.append(f'<span class="chunk"><small>{name}</small>{text}</span>')
    return f'<details open><summary>the prompt</summary><div class="text">{"".join(parts)}</div></details>'


def _span(prompt: str, run: Run) -> str:
    text = escape(prompt[run.start : run.end])
    return f"<span>{text}</span>" if run.fate is Fate.FRESH else f'<span class="f{int(run.fate)}">{text}</span>'
