"""Hints: the chunks and the question that a retriever announces before the prompt arrives."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from ..prompt.question import ends_of

_KEPT, _RECENT = 256, 8
"""Announcements that are remembered, and of how many the chunks count: a prompt follows its retrieval soon."""


_LOOKED_AT = 64
"""Occurrences of a question in a prompt that are looked at, from the end."""


class Found(Protocol):
    """A stretch of a prompt that is known as the chunk ``key``."""

    @property
    def key(self) -> str: ...
    @property
    def end(self) -> int: ...
    @property
    def start(self) -> int: ...


@dataclass(frozen=True)
class _Hint:
    question: str
    keys: frozenset[str]
    caller: Hashable


class Hints:
    """The latest announcements: questions, and the keys of the chunks retrieved for them. Thread-safe.

    Each belongs to its caller; callers that are not named share theirs.
    """

    def __init__(self) -> None:
        self._latest: OrderedDict[_Hint, None] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, question: str | None, keys: Iterable[str], caller: Hashable = None) -> None:
        hint = _Hint((question or "").strip(), frozenset(keys), caller)
        with self._lock:
            self._latest[hint] = None
            self._latest.move_to_end(hint)
            while len(self._latest) > _KEPT:
                self._latest.popitem(last=False)

    def keys(self, caller: Hashable = None) -> frozenset[str]:
        """Of the chunks that this caller announced lately."""
        return frozenset[str]().union(*(hint.keys for hint in self._of(caller)[:_RECENT]))

    def question(self, prompt: str, spans: Sequence[Found], caller: Hashable = None) -> str | None:
        """The question that this caller announced together with the chunks of this prompt.

        Most of what is known of the prompt (``spans``, in order) was announced with it, and it stands behind that
        between word borders (of a word or two: beside no other word), or in front of it on a line of its own. Of
        several the one nearest to the prompt's end, then the longest, then the latest.
        """
        if not spans:
            return None
        known = sum(span.end - span.start for span in spans)
        best: tuple[int, int] | None = None
        found = None
        for hint in self._of(caller):
            if not hint.question or not hint.keys:
                continue
            announced = sum(span.end - span.start for span in spans if span.key in hint.keys)
            if 2 * announced < known or hint.question not in prompt:
                continue
            place = _stands(hint.question, prompt, spans[0].start, spans[-1].end)
            if place is not None and (best is None or (place, len(hint.question)) > best):
                best, found = (place, len(hint.question)), hint.question
        return found

    def _of(self, caller: Hashable) -> list[_Hint]:
        """A caller's announcements, the latest first."""
        with self._lock:
            return [hint for hint in reversed(self._latest) if hint.caller == caller]


def _stands(question: str, prompt: str, first: int, last: int) -> int | None:
    """Where the last occurrence of a question ends that is meant as one: behind ``last`` between word borders, or
    before ``first`` on a line of its own, be it behind a label ("Query: ").
    """
    for start, end, alone in ((last, len(prompt), False), (0, first, True)):
        stands = _on_its_own if alone else _between_words
        for behind in islice(ends_of(question, prompt, start, end), _LOOKED_AT):
            if stands(prompt, behind - len(question), behind):
                return behind
    return None


def _between_words(prompt: str, start: int, end: int) -> bool:
    """Of one or two words, which are easily part of another sentence, also that no word of it is beside them."""

    def inside(at: int) -> bool:
        return 0 < at < len(prompt) and _word(prompt[at - 1]) and _word(prompt[at])

    if inside(start) or inside(end):
        return False
    if len(prompt[start:end].split()) > 2:
        return True
    before, behind = prompt[max(0, start - _LOOKED_AT) : start].rstrip(), prompt[end : end + _LOOKED_AT].lstrip()
    goes_on = _word(prompt[end - 1]) and _word(behind[:1])
    return not _word(before[-1:]) and not goes_on


def _word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _on_its_own(prompt: str, start: int, end: int) -> bool:
    line = prompt.rfind("\n", 0, start) + 1
    before, behind = prompt[line:start].rstrip(), prompt[end : end + _LOOKED_AT].partition("\n")[0]
    return not behind.strip() and (not before or before.endswith((":", "\uff1a")))
