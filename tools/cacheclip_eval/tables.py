"""Markdown tables of rows: a summary by system, and differences from a baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .figures import comparison, summary

Record = dict[str, Any]

_COLUMNS: dict[str, Callable[[Record], str]] = {
    "system": lambda r: r["system"].replace("|", "\\|"),
    "items": lambda r: f"{r['items']} ({r['failed']} failed)" if r["failed"] else str(r["items"]),
    "score": lambda r: _mean(r, "score"),
    "adjusted": lambda r: f"{_mean(r, 'adjusted')} ({r['solved']})",
    "normalised": lambda r: _number(r["normalised"], ".0f"),
    "agree": lambda r: _mean(r, "agree"),
    "KL": lambda r: _mean(r, "kl"),
    "median": lambda r: _number(r["kl_median"]),
    "ratio": lambda r: _number(r["ratio"]),
    "TTFT": lambda r: _number(r["ttft"], ".2f"),
    "bytes/token": lambda r: _number(r["bytes_per_token"], ",.0f"),
    "NLL": lambda r: _number(r["nll"]),
}

_DIFFERENCES: dict[str, Callable[[Record], str]] = {
    "system": _COLUMNS["system"],
    "items": lambda r: str(r["items"]),
    "score": lambda r: _difference(r["score"]),
    "adjusted": lambda r: _difference(r["adjusted"]) + (f" ({r['adjusted']['items']})" if r["adjusted"] else ""),
    "agree": lambda r: _difference(r["agree"]),
    "KL": lambda r: _difference(r["kl"]),
}


def summarise(path: str | Path) -> str:
    """One Markdown table per data set of `figures.summary`: mean [95 % bootstrap interval]; – for a missing number.

    *adjusted* has its number of items in brackets, *normalised* is 0 for plain reuse and 100 for full prefill, *ratio*
    is as realised, *median* is the KL's, *TTFT* is relative to full prefill, *NLL* (where rows have it) is the right
    answer's. Systems that fell back are listed below. The same rows give the same text.
    """
    parts = []
    for dataset, records in _grouped(summary(path)).items():
        known = any(record["nll"] is not None for record in records)
        columns = {name: cell for name, cell in _COLUMNS.items() if known or name != "NLL"}
        parts.append(f"### {dataset}\n\n{_table(columns, records)}")
        if fell := [f"{r['system']} on {r['fell_back']}" for r in records if r["fell_back"]]:
            parts.append(f"Items on which reuse was given up, wholly or for a chunk: {', '.join(fell)}.")
    return "\n\n".join(parts) + "\n"


def compare(path: str | Path, baseline: str) -> str:
    """One Markdown table per data set: each system minus ``baseline`` on the same items, [95 % bootstrap interval].

    "none" means that the interval contains 0 or that there are too few items. Raises `ConfigurationError` for an
    unknown baseline.
    """
    parts = [
        f"### {dataset}, minus {baseline}\n\n{_table(_DIFFERENCES, records)}"
        for dataset, records in _grouped(comparison(path, baseline)).items()
    ]
    return "\n\n".join(parts) + "\n"


def _grouped(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["dataset"], []).append(record)
    return groups


def _table(columns: dict[str, Callable[[Record], str]], records: Sequence[Record]) -> str:
    lines = [list(columns), *([cell(record) for cell in columns.values()] for record in records)]
    head, *body = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([head, "|" + "---|" * len(columns), *body])


def _mean(record: Record, name: str) -> str:
    bounds = record[f"{name}_interval"]
    return _number(record[name]) + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")


def _difference(result: Record | None) -> str:
    if result is None:
        return "–"
    bounds = result["interval"]
    return (f"{result['difference']:+.3f}" if result["found"] else "none") + (
        f" [{bounds[0]:+.3f}, {bounds[1]:+.3f}]" if bounds else ""
    )


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)
