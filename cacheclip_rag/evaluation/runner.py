"""Runs systems over items and appends a row for each to a JSONL file, so that it can stop and go on at any time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..auxiliary import Auxiliary
from ..engine import Engine
from ..methods import Method
from ..prefill import Prefill
from . import metrics
from .data import Item, prompt

ANSWER_TOKENS = 24
"""Answer tokens (at most) that the KL is averaged over."""


@dataclass(frozen=True, eq=False)
class System:
    """One thing to compare: a method at a ratio, under a ``label`` that names it in rows and tables."""

    label: str
    method: Method | str
    ratio: float | None = None
    auxiliary: Auxiliary | None = None


def run(
    engine: Engine,
    items: Sequence[Item],
    systems: Sequence[System],
    path: str | Path,
    *,
    dataset: str,
    max_new_tokens: int = 48,
) -> None:
    """Answer every item with full prefill and with every system; rows of an earlier run are kept and not repeated.

    Full prefill runs once an item; its greedy answer is the text that all systems are teacher-forced on for the KL.
    A row says which weights it belongs to; a file of another model's rows is refused with ValueError.
    """
    path = Path(path)
    identity = engine.library.namespace.digest[:16]
    done = _done(path, identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for item in tqdm(items, desc=dataset):
            todo = [s for s in systems if (dataset, item.id, s.label) not in done]
            if not todo:
                continue
            text = prompt(item, engine.backbone)
            full = engine.prefill(text, method="full", room=max_new_tokens + 1)
            answer = _decode(engine, full, max_new_tokens)
            forced = answer[:ANSWER_TOKENS]
            reference = _forced(engine, full, forced)
            full_text = _text(engine, answer)
            rows = [] if (dataset, item.id, "full") in done else [_row(item, "full", full, full_text, full_text, 0.0)]
            engine.ensure([passage.chunk for passage in item.passages])
            for system in todo:
                if system.auxiliary is not None:
                    engine.auxiliary = system.auxiliary
                prefill = engine.prefill(
                    text,
                    question=item.question,
                    method=system.method,
                    recompute_ratio=system.ratio,
                    room=max_new_tokens + 1,
                )
                distance = metrics.kl(reference, _forced(engine, prefill, forced))
                own = _text(engine, _decode(engine, prefill, max_new_tokens))
                rows.append(_row(item, system.label, prefill, own, full_text, distance))
            for row in rows:
                file.write(json.dumps({"dataset": dataset, "model": identity, **row}) + "\n")
            file.flush()


def _forced(engine: Engine, prefill: Prefill, answer: list[int]) -> Tensor:
    """Logits ``[n, V]`` of the n answer tokens' positions, the answer given."""
    if len(answer) < 2:
        return prefill.logits
    assert prefill.canvas is not None
    ids, start = torch.tensor(answer[:-1]), len(prefill.layout)
    rows = torch.arange(start, start + len(ids))
    rest = engine.backbone.forward(ids, rows, prefill.canvas, logits=len(ids))
    prefill.canvas.length = start
    assert rest is not None
    return torch.cat([prefill.logits, rest])


def _decode(engine: Engine, prefill: Prefill, max_new_tokens: int) -> list[int]:
    tokens = engine.backbone.generate(
        prefill.layout.ids, prefill.logits, prefill.step, max_new_tokens=max_new_tokens, do_sample=False
    )
    return list(tokens)


def _text(engine: Engine, ids: list[int]) -> str:
    text: str = engine.backbone.tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()


def score(item: Item, text: str) -> float:
    """0..1: RULER's containment where the item asks for it, else F1."""
    if item.all_answers:
        return metrics.recall(text, item.answers)
    if item.contained:
        return max((metrics.recall(text, [answer]) for answer in item.answers), default=0.0)
    return metrics.f1(text, item.answers)


def _row(item: Item, system: str, prefill: Prefill, text: str, full: str, distance: float) -> dict[str, Any]:
    report = prefill.report
    return {
        "id": item.id,
        "task": item.meta.get("task"),
        "system": system,
        "answer": text,
        "score": score(item, text),
        "em": metrics.exact_match(text, item.answers),
        "agree": 1.0 if text == full else metrics.f1(text, [full]),
        "kl": distance,
        "ratio": report.ratio,
        "prompt_tokens": report.prompt_tokens,
        "reused": report.reused,
        "computed": report.computed_tokens,
        "ttft": report.ttft,
        "seconds": report.seconds,
        "fallbacks": report.fallbacks,
    }


def _done(path: Path, identity: str) -> set[tuple[str, str, str]]:
    if not path.exists():
        return set()
    done = set()
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            model, name = row["model"], (row["dataset"], row["id"], row["system"])
        except (ValueError, KeyError, TypeError):  # cut short by a kill, say
            raise ValueError(f"{path}, line {number} is no whole row: delete that line to go on") from None
        if model != identity:
            raise ValueError(
                f"{path}, line {number} belongs to another model or version ({model}): choose another file"
            )
        done.add(name)
    return done
