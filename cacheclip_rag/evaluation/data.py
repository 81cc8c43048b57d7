"""Question answering data: one JSON object a line, with a question, its answers and the passages to read."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..backbone import Backbone

log = logging.getLogger("cacheclip_rag")

INSTRUCTION = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words."
)


@dataclass(frozen=True)
class Passage:
    title: str
    text: str

    @property
    def chunk(self) -> str:
        """The passage as it stands in a prompt."""
        return f"{self.title}\n{self.text}".strip() if self.title else self.text.strip()


@dataclass(frozen=True)
class Item:
    """One question. ``all_answers``: the answer must contain every one of ``answers``, not any (RULER)."""

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    all_answers: bool = False
    meta: dict[str, Any] = field(default_factory=dict)


def read(path: str | Path) -> list[Item]:
    """The items of a JSONL file. A malformed line is reported with its number and left out."""
    items = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            meta = record.get("meta") or {}
            items.append(
                Item(
                    id=str(record["id"]),
                    question=record["question"],
                    answers=tuple(record["answers"]),
                    passages=tuple(Passage(p.get("title") or "", p["text"]) for p in record["passages"]),
                    all_answers="all_answers_required" in meta,
                    meta=meta,
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s, line %d left out: %s: %s", path, number, type(error).__name__, error)
    return items


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """``count`` items spread evenly over the file, so that no run is a run of its first topics."""
    if count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def prompt(item: Item, backbone: Backbone) -> str:
    """LongBench's question-answering prompt, in the model's chat template."""
    context = "\n\n".join(passage.chunk for passage in item.passages)
    content = (
        f"{INSTRUCTION}\n\nThe following are given passages.\n{context}\n\n"
        f"{INSTRUCTION}\n\nQuestion: {item.question}\nAnswer:"
    )
    return backbone.chat([{"role": "user", "content": content}])
