"""What retrievers announce before a prompt comes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

_KEPT, _RECENT = 256, 8
"""Announcements that are remembered, and of how many the chunks count: a prompt follows its retrieval soon."""


class Hints:
    """The latest announcements: questions, and keys of chunks that are about to come with them. Thread-safe."""

    def __init__(self) -> None:
        self._latest: OrderedDict[tuple[str, frozenset[str]], None] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, question: str | None, keys: Iterable[str]) -> None:
        hint = (question or "", frozenset(keys))
        with self._lock:
            self._latest[hint] = None
            self._latest.move_to_end(hint)
            while len(self._latest) > _KEPT:
                self._latest.popitem(last=False)

    def of(self, prompt: str) -> tuple[frozenset[str], str | None]:
        """Keys of recently announced chunks, and the newest announced question that stands in this prompt."""
        with self._lock:
            latest = list(reversed(self._latest))
        keys = frozenset[str]().union(*(keys for _, keys in latest[:_RECENT]))
        return keys, next((question for question, _ in latest if question and question in prompt), None)
