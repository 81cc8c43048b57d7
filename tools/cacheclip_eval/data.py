"""Question answering data: one JSON object per line, with a question, its answers and its passages."""

from __future__ import annotations

import codecs
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cacheclip_rag.model.backbone import Backbone

log = logging.getLogger("cacheclip_rag")

INSTRUCTION = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words."
)


@dataclass(frozen=True)
class Passage:
    """One passage of an item. ``supporting``: whether the answer needs it, according to the data."""

    title: str
    text: str
    supporting: bool = False

    @property
    def chunk(self) -> str:
        """The passage as it stands in a prompt."""
        return f"{self.title}\n{self.text}".strip() if self.title else self.text.strip()


@dataclass(frozen=True)
class Item:
    """One question. ``all_answers``: an answer must contain all of ``answers``, not just one."""

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    all_answers: bool = False
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def contained(self) -> bool:
        """Whether it is scored by the occurrence of the answers in the output, as in RULER, and not by F1."""
        return "all_answers_required" in self.meta


def read(path: str | Path) -> list[Item]:
    """The items of a JSONL file. Malformed lines are skipped, with a warning that names the line."""
    items: dict[str, Item] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            item = _item(json.loads(line.decode("utf-8")))
            if item.id in items:
                raise ValueError(f'the id "{item.id}" has come before')
            items[item.id] = item
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("%s, line %d left out: %s: %s", path, number, type(error).__name__, error)
    return list(items.values())


def passages(path: str | Path) -> list[str]:
    """The passages of a JSONL file of ``{"title", "text"}``, as in prompts. Malformed lines are skipped."""
    found = []
    for line in _lines(path):
        try:
            record = json.loads(line.decode("utf-8"))
            found.append(Passage(_text(record.get("title") or ""), _text(record["text"])).chunk)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return found


def _lines(path: str | Path) -> list[bytes]:
    return Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")


def _item(record: dict[str, Any]) -> Item:
    """An item from its JSON record. Raises KeyError, TypeError or AttributeError for a malformed record."""
    meta = record.get("meta") or {}
    passages = tuple(
        Passage(_text(p.get("title") or ""), _text(p["text"]), p.get("is_supporting") is True)
        for p in _list(record["passages"])
    )
    if not isinstance(meta, dict):
        raise TypeError("meta is no object")
    return Item(
        id=_id(record["id"]),
        question=_text(record["question"]),
        answers=tuple(_text(answer) for answer in _list(record["answers"])),
        passages=passages,
        all_answers=bool(meta.get("all_answers_required")),
        meta=meta,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text is wanted, not {type(value).__name__}")
    return value


def _id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError(f"an id is text or a number, not {value!r}")
    return str(value)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"a list is wanted, not {type(value).__name__}")
    return value


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """``count`` items spread evenly over the file, so that a run does not consist of the first topics only."""
    if count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def shortened(item: Item, count: int | None) -> Item:
    """The item with at most ``count`` of its passages, in their order. Supporting passages are kept first, then those
    that contain an answer, then the first ones.
    """
    if count is None or count >= len(item.passages):
        return item

    def rank(number: int) -> tuple[bool, bool, int]:
        passage = item.passages[number]
        holds = any(answer.lower() in passage.chunk.lower() for answer in item.answers)
        return not passage.supporting, not holds, number

    kept = sorted(sorted(range(len(item.passages)), key=rank)[:count])
    return replace(item, passages=tuple(item.passages[number] for number in kept))


def shuffled(item: Item, seed: int) -> Item:
    """The item with its passages in another order, the same for the same ``seed``; 0 leaves them as they are."""
    if not seed:
        return item
    order = random.Random(f"{seed} {item.id}").sample(range(len(item.passages)), len(item.passages))
    return replace(item, passages=tuple(item.passages[number] for number in order))


def prompt(item: Item, backbone: Backbone) -> str:
    """LongBench's question-answering prompt, in the model's chat template."""
    context = "\n\n".join(passage.chunk for passage in item.passages)
    content = (
        f"{INSTRUCTION}\n\nThe following are given passages.\n{context}\n\n"
        f"{INSTRUCTION}\n\nQuestion: {item.question}\nAnswer:"
    )
    return backbone.chat([{"role": "user", "content": content}])


def right_answer(item: Item, backbone: Backbone) -> Tensor:
    """The tokens ``[A]`` int64 of the item's first answer and of the model's end of text. ``[0]`` for an item without
    one, and for one that wants several, in whatever order and form.
    """
    given = next((answer.strip() for answer in item.answers if answer.strip()), None)
    if given is None or (item.all_answers and len(item.answers) > 1):
        return torch.tensor([], dtype=torch.long)
    end = backbone.tokenizer.eos_token_id
    ends = torch.tensor([] if end is None else [end], dtype=torch.long)
    return torch.cat([backbone.tokenise(given, plain=True).ids, ends])
