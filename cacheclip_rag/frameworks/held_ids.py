"""Which ids of a vector store have which text, so that a text's KV is deleted with the last of them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StoredChunk:
    """An entry of a vector store. ``document``: what it is a part of, where that is known."""

    id: str
    text: str
    document: str | None = None


class HeldIds:
    """The ids of a vector store and what they hold, as far as this process has seen them. Thread-safe."""

    def __init__(self, chunks: Iterable[StoredChunk] = ()) -> None:
        self._chunks: dict[str, StoredChunk] = {}
        self._ids: dict[str, set[str]] = {}  # by text
        self._lock = threading.Lock()
        self.hold(chunks)

    def __reduce__(self) -> tuple[Any, ...]:
        return HeldIds, (self.get(self.ids()),)

    def __len__(self) -> int:
        return len(self._chunks)

    def ids(self) -> list[str]:
        with self._lock:
            return list(self._chunks)

    def get(self, ids: Iterable[str]) -> list[StoredChunk]:
        """What those of ``ids`` hold that are known."""
        with self._lock:
            return [self._chunks[id_] for id_ in ids if id_ in self._chunks]

    def of(self, document: str) -> list[StoredChunk]:
        """The chunks of a document."""
        with self._lock:
            return [chunk for chunk in self._chunks.values() if chunk.document == document]

    def hold(self, chunks: Iterable[StoredChunk]) -> None:
        """These ids hold these chunks from now on, and no longer what they had."""
        with self._lock:
            for chunk in chunks:
                self._release(chunk.id)
                self._chunks[chunk.id] = chunk
                self._ids.setdefault(canonical(chunk.text), set()).add(chunk.id)

    def release(self, ids: Iterable[str]) -> None:
        """These ids are gone."""
        with self._lock:
            for id_ in ids:
                self._release(id_)

    def unused(self, texts: Iterable[str]) -> list[str]:
        """Those of ``texts`` that no known id has, each once."""
        with self._lock:
            return [text for text in dict.fromkeys(map(canonical, texts)) if text not in self._ids]

    def has(self, document: str, text: str) -> bool:
        """Whether an id holds this text as a part of this document."""
        with self._lock:
            ids = self._ids.get(canonical(text), ())
            return any(self._chunks[id_].document == document for id_ in ids)

    def _release(self, id_: str) -> None:
        old = self._chunks.pop(id_, None)
        if old is None:
            return
        text = canonical(old.text)
        self._ids[text].discard(id_)
        if not self._ids[text]:
            del self._ids[text]


def canonical(text: str) -> str:
    """The text a chunk is known by, as in `cacheclip_rag.chunks`, which would load torch."""
    return text.strip()
