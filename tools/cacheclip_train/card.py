"""The card of a trained folder: on what it was trained, for which model, and what it gained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cacheclip_rag.model.adapter import CARD
from cacheclip_rag.store import files

_WHAT = {"head": "Head on", "links": "Link tokens of", "packet": "Packet (header and trailer) of"}
"""What a folder holds, by the command that wrote it; otherwise a LoRA adapter."""


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write ``card.json``, which the library checks, and ``README.md``, the same for readers."""
    files.publish(folder / "README.md", readme(card).encode())
    files.publish(folder / CARD, json.dumps(card, indent=1, ensure_ascii=False).encode())


def readme(card: Mapping[str, Any]) -> str:
    """The card in Markdown."""
    model, data, training = card["primary"]["name"], card["data"], card["training"]
    fitted = f", fitted to `{card['fitted_to']['name']}`" if "fitted_to" in card else ""
    names = list(training["history"][0]["held_out"])
    lines = [
        f"# {_WHAT.get(card['kind'], 'LoRA adapter of')} `{model}`{fitted}",
        "",
        f"Use it as `{card['uses']}`. Written by cacheclip-rag {card['library']}, `cacheclip tune {card['kind']}`.",
        "",
        "## Trained on",
        "",
    ]
    for name, documents in data["documents"].items():
        counts = ", ".join(f"{len(titles)} to {part}" for part, titles in documents.items())
        lines.append(f"- {name}: documents of the questions: {counts}")
    lines += [
        f"- {data['train']} questions to train on, {data['stop']} to stop by",
        f"- {training['tokens']:,} tokens in {training['step']} steps, {training['seconds'] / 3600:.2f} hours",
        "",
        "## What it gained",
        "",
        f"On the questions to stop by: {training['unit']}.",
        "",
        "| tokens | " + " | ".join(names) + " |",
        "|---" * (1 + len(names)) + "|",
    ]
    for row in training["history"]:
        lines.append(f"| {row['tokens']:,} | " + " | ".join(f"{v:.3f}" for v in row["held_out"].values()) + " |")
    if reported := card.get("report"):
        lines += [
            "",
            "On questions about documents to report on, which decided nothing:",
            "",
            "| | loss |",
            "|---|---|",
        ]
        lines += [f"| {name} | {value:.3f} |" for name, value in reported.items()]
    return "\n".join(lines) + "\n"
