"""Answers one item by full prefill and by every system, and compares each system with full prefill."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from cacheclip_rag.engine import Engine
from cacheclip_rag.methods.auxiliary import Auxiliary
from cacheclip_rag.prefill.result import Prefill
from cacheclip_rag.verification import kl

from . import access, metrics, rows
from .data import Item, right_answer
from .references import Reference, References, likelihood, measured
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
        reference = references.of(engine, text, right_answer(item, engine.backbone))
    except Exception as error:
        for row in wanted:
            yield _failed(row, error, "full prefill: ")
        return
    known: list[Sequence[int]] = []
    for row in wanted:
        try:
            if row["system"] == "full":
                answer = _text(engine, reference.answer)
                done = row | scores(item, answer, answer, 0.0) | reference.numbers
                done |= {"stored_bytes": 0, "stored_tokens": 0, "auxiliary_bytes": 0}
            else:
                system = systems[row["system"]]
                engine.auxiliary = system.auxiliary or own
                done = row | measure(engine, item, text, system, reference, known, row["max_new_tokens"])
        except Exception as error:
            done = _failed(row, error)
        yield done


def _failed(row: Row, error: Exception, where: str = "") -> Row:
    log.warning("%s, %s, %s failed: %s", *rows.key(row), error, exc_info=error)
    return row | {"error": f"{where}{type(error).__name__}: {error}"}


def measure(
    engine: Engine, item: Item, text: str, system: System, reference: Reference, known: list[Sequence[int]], length: int
) -> dict[str, Any]:
    """What a system answers, and its comparison with full prefill. Its answer is added to the ``known`` ones."""
    chunks, method = [passage.chunk for passage in item.passages], system.recipe
    before = access.written(engine, method)
    access.ensure(engine, item, method)
    if system.plan is not None:
        method = access.fuse(engine, method, system.plan(item))
    right = right_answer(item, engine.backbone)
    room = max(length, len(right)) + 1
    prefill = engine.prefill(text, question=item.question, method=method, recompute_ratio=system.ratio, room=room)
    nll = likelihood(prefill, right)
    logits = prefill.forced(reference.answer)
    known.append(decode(engine, prefill, [reference.answer, *known], logits, length))
    answer = _text(engine, known[-1])
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
        "nll": nll,
        "stored_bytes": size and size[0],
        "stored_tokens": size and size[1],
        "auxiliary_bytes": aside and aside[0],
    }


def decode(
    engine: Engine, prefill: Prefill, known: Sequence[Sequence[int]], logits: Tensor, max_new_tokens: int
) -> Sequence[int]:
    """The greedy answer. ``logits [n, V]`` are those at the first n tokens of the first ``known`` answer."""
    step = Verified(prefill, known, logits)
    return list(
        engine.backbone.generate(
            prefill.layout.ids, prefill.logits, step, max_new_tokens=max_new_tokens, do_sample=False
        )
    )


class Verified:
    """A decoding step that computes the logits of a whole ``known`` answer in one forward where the greedy answer has
    begun like it, and single tokens elsewhere: systems often give one of few answers to a question.

    As speculative decoding, with answers of other systems as drafts. Later steps overwrite the KV of tokens that were
    not taken.
    """

    def __init__(self, prefill: Prefill, known: Sequence[Sequence[int]], logits: Tensor) -> None:
        self._step, self._start, self._known = prefill.step, len(prefill.layout), known
        self._taken: list[int] = []
        self._draft, self._first, self._logits = list(known[0][: len(logits)]), 0, logits

    def __call__(self, token: Tensor, row: int) -> Tensor:
        """The logits ``[1, V]`` behind ``token [1]``, which stands in ``row``."""
        self._taken.append(int(token))
        place = len(self._taken)
        if self._taken != self._draft[:place] or place - self._first >= len(self._logits):
            rest = max((self._rest(answer) for answer in self._known), key=len)
            self._draft, self._first = [*self._taken, *rest], place
            self._logits = self._step(torch.tensor(self._draft[place - 1 :]), row)
        return self._logits[place - self._first][None]

    def _rest(self, answer: Sequence[int]) -> Sequence[int]:
        """What of an answer follows the tokens taken, without its last token, behind which nothing is asked."""
        place = len(self._taken)
        return answer[place:-1] if list(answer[:place]) == self._taken else ()


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
