"""Rows to tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any


def summarise(path: str | Path) -> str:
    """A Markdown table a data set: score, adjusted score, agreement and KL against full prefill, realised ratio."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    parts = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        mine = [row for row in rows if row["dataset"] == dataset]
        full = {row["id"]: row for row in mine if row["system"] == "full"}
        head = "| system | items | score | adjusted | agree | KL | ratio |\n|---|---|---|---|---|---|---|"
        lines = [
            _line(system, [row for row in mine if row["system"] == system and row["id"] in full], full)
            for system in dict.fromkeys(row["system"] for row in mine)
        ]
        parts.append(f"### {dataset}\n\n" + "\n".join([head, *lines]))
    return "\n\n".join(parts) + "\n"


def _line(system: str, rows: list[dict[str, Any]], full: dict[str, dict[str, Any]]) -> str:
    solved = [row for row in rows if full[row["id"]]["score"] > 0]
    cells = [
        system,
        str(len(rows)),
        _number(row["score"] for row in rows),
        f"{_number(row['score'] for row in solved)} ({len(solved)})",
        _number(row["agree"] for row in rows),
        _number(row["kl"] for row in rows),
        _number(row["ratio"] for row in rows),
    ]
    return "| " + " | ".join(cells) + " |"


def _number(values: Iterable[float]) -> str:
    values = list(values)
    return f"{mean(values):.3f}" if values else "–"
