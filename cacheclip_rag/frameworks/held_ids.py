"""Which of a vector store's ids have which text, so that a text's KV goes with the last of them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping


class Holdings:
    """Ids and the texts they have, as far as this process has seen them. Thread-safe."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._ids: dict[str, set[str]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._texts)

    def ids(self) -> list[str]:
        with self._lock:
            return list(self._texts)

    def texts(self, ids: Iterable[str]) -> dict[str, str]:
        """By id, for those of ``ids`` that are known."""
        with self._lock:
            return {id_: self._texts[id_] for id_ in ids if id_ in self._texts}

    def hold(self, texts: Mapping[str, str]) -> None:
        """These ids have these texts from now on, and no longer what they had."""
        with self._lock:
            for id_, text in texts.items():
                self._release(id_)
                text = canonical(text)
                self._texts[id_] = text
                self._ids.setdefault(text, set()).add(id_)

    def release(self, ids: Iterable[str]) -> None:
        """These ids are gone."""
        with self._lock:
            for id_ in ids:
                self._release(id_)

    def unused(self, texts: Iterable[str]) -> list[str]:
        """Those of ``texts`` that no known id has, each once."""
        with self._lock:
            return [text for text in dict.fromkeys(map(canonical, texts)) if text not in self._ids]

    def _release(self, id_: str) -> None:
        old = self._texts.pop(id_, None)
        if old is None:
            return
        self._ids[old].discard(id_)
        if not self._ids[old]:
            del self._ids[old]


def canonical(text: str) -> str:
    """The text a chunk is known by, as in `cacheclip_rag.chunks`, which would load torch."""
    return text.strip()
