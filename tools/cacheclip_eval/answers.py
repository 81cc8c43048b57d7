"""Answers one item by full prefill and by every system, and compares each system with full prefill."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from cacheclip_rag.engine import Engine
from cacheclip_rag.methods.auxiliary import Auxiliary
from cacheclip_rag.prefill.result import Prefill
from cacheclip_rag.verification import kl

from . import access, metrics, rows
from .data import Item
from .references import Reference, References, measured
from .rows import Row
from .systems import System

log = logging.getLogger("cacheclip_rag")


def answers(
    engine: Engine,
    item: Item,
    text: str,
    wanted: Sequence[Row],
    systems: Mapping[str, System],
    references: References,
    own: Auxiliary | None,
) -> Iterator[Row]:
    """The rows of one item, one by one; a failed answer is a row with ``error``.

    ``wanted``: the rows with the fields that are known in advance. ``own``: the engine's auxiliary model.
    """
    first = next((systems[row["system"]] for row in wanted if row["system"] in systems), None)
    if first is not None:
        # Full prefill must know the documents as well: otherwise it alone would interpret control tokens in them.
        # If this fails, it fails again below, where it is reported.
        with suppress(Exception):
            engine.ensure([passage.chunk for passage in item.passages], method=first.recipe)
    try:
        reference = references.of(engine, text)
    except Exception as error:
        for row in wanted:
            yield _failed(row, error, "full prefill: ")
        return
    for row in wanted:
        try:
            if row["system"] == "full":
                answer = _text(engine, reference.answer)
                done = row | scores(item, answer, answer, 0.0) | reference.numbers
                done |= {"stored_bytes": 0, "stored_tokens": 0, "auxiliary_bytes": 0}
            else:
                system = systems[row["system"]]
                engine.auxiliary = system.auxiliary or own
                done = row | measure(engine, item, text, system, reference, row["max_new_tokens"])
        except Exception as error:
            done = _failed(row, error)
        yield done


def _failed(row: Row, error: Exception, where: str = "") -> Row:
    log.warning("%s, %s, %s failed: %s", *rows.key(row), error, exc_info=error)
    return row | {"error": f"{where}{type(error).__name__}: {error}"}


def measure(
    engine: Engine, item: Item, text: str, system: System, reference: Reference, max_new_tokens: int
) -> dict[str, Any]:
    chunks, method = [passage.chunk for passage in item.passages], system.recipe
    before = access.written(engine, method)
    access.ensure(engine, item, method)
    if system.plan is not None:
        method = access.fuse(engine, method, system.plan(item))
    prefill = engine.prefill(
        text, question=item.question, method=method, recompute_ratio=system.ratio, room=max_new_tokens + 1
    )
    logits = prefill.forced(reference.answer)
    answer = _text(engine, decode(engine, prefill, reference.answer, logits, max_new_tokens))
    compared = logits[: len(reference.logits)].bfloat16().cpu()
    if method.ahead:
        size = access.stored(engine.library_of(method), chunks, method.fit)
    else:
        size = access.left(engine, method, chunks, before)
    helper = engine.auxiliary if method.select.needs_auxiliary else None
    aside = access.stored(helper.library, chunks) if helper is not None else (0, 0)
    return {
        **scores(item, answer, _text(engine, reference.answer), kl(reference.logits, compared)),
        **measured(prefill.report),
        "stored_bytes": size and size[0],
        "stored_tokens": size and size[1],
        "auxiliary_bytes": aside and aside[0],
    }


def decode(
    engine: Engine, prefill: Prefill, forced: Sequence[int], logits: Tensor, max_new_tokens: int
) -> Sequence[int]:
    """The greedy answer. While it equals the forced one, the logits are known; later steps overwrite the KV behind."""
    start, same = len(prefill.layout), True

    def step(token: Tensor, row: int) -> Tensor:
        nonlocal same
        place = row - start
        same = same and place < len(forced) - 1 and int(token) == forced[place]
        return logits[place + 1 : place + 2] if same else prefill.step(token, row)

    return list(
        engine.backbone.generate(
            prefill.layout.ids, prefill.logits, step, max_new_tokens=max_new_tokens, do_sample=False
        )
    )


def _text(engine: Engine, ids: Sequence[int]) -> str:
    text: str = engine.backbone.tokenizer.decode(list(ids), skip_special_tokens=True)
    return text.strip()


def score(item: Item, text: str) -> float:
    """The score of an answer, 0..1: RULER's string match if the item asks for it, else F1."""
    if item.all_answers:
        return metrics.recall(text, item.answers)
    if item.contained:
        return max((metrics.recall(text, [answer]) for answer in item.answers), default=0.0)
    return metrics.f1(text, item.answers)


def scores(item: Item, text: str, full: str, distance: float) -> dict[str, Any]:
    """The scores of an answer against the item's answers, and against full prefill's answer."""
    return {
        "answer": text,
        "chunks": len(item.passages),
        "score": score(item, text),
        "em": metrics.exact_match(text, item.answers),
        "agree": 1.0 if text == full else metrics.f1(text, [full]),
        "kl": distance,
    }
