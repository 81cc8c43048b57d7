"""Data sets as files and folders, for the tests of evaluations at the command line."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from cacheclip_eval import Item, Passage
from tiny import PASSAGES


def ruler(**changes: Any) -> ModuleType:
    """Stands for ``evaluation.ruler``."""
    module = ModuleType("cacheclip_eval.ruler")

    def generate(task: str, *, tokens: int, seed: int, count: Any = None) -> Item:
        text = (PASSAGES[0] * 40)[: tokens - len(str(seed))] + str(seed)
        assert count(text) == tokens  # bytes are tokens here
        return Item(f"{task}-{seed}", "Which?", (str(seed),), (Passage("", text),), meta={"all_answers_required": True})

    module.__dict__.update({"TASKS": ("niah_single", "vt"), "generate": generate} | changes)
    return module


def data(folder: Path, *questions: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    passages = [{"title": "", "text": text} for text in PASSAGES[:2]]
    records = [
        {"id": str(i), "question": q, "answers": ["1874"], "passages": passages} for i, q in enumerate(questions)
    ]
    path = folder / "qa.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
