"""Chunks in an engine of this process: encoded, fused and forgotten, with the documents they belong to."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from .chunk_kv import OnMiss, Part
from .fuser import Fuser

if TYPE_CHECKING:
    from ..engine import Engine

log = logging.getLogger("cacheclip_rag")

_ingested: weakref.WeakKeyDictionary[Engine, dict[tuple[str, str], frozenset[str]]] = weakref.WeakKeyDictionary()
"""By engine, source and document, the keys of the chunks it had at its latest ingestion."""
_lock = threading.Lock()


class EngineKV:
    """The `ChunkKV` of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def fingerprint(self) -> str:
        """The namespaces of the engine's KV; empty for a model that is served without."""
        libraries = [self._engine.library] if self._engine.composable else []
        if self._engine.auxiliary is not None:
            libraries.append(self._engine.auxiliary.library)
        return "+".join(library.namespace.digest for library in libraries)

    def encode(
        self,
        parts: Sequence[Part],
        *,
        fuser: Fuser | None = None,
        show_progress: bool = True,
        replaced: Collection[str] = (),
    ) -> int:
        if fuser is not None:
            fuser.follow(self._engine)
        # Whose chunks these are, so that engine.forget_document finds them.
        self._engine.documents.note((document, text) for document, text in parts if document)
        return encode(self._engine, [text for _, text in parts], show_progress)

    def fuse(self, fuser: Fuser, show_progress: bool = True) -> None:
        fuser(self._engine, show_progress)

    def ingested(
        self,
        source: str,
        parts: Sequence[Part],
        *,
        fuser: Fuser | None = None,
        vectors: Mapping[str, Any] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.encode(parts, fuser=fuser, show_progress=show_progress)
        self._forget_replaced(source, parts)
        if fuser is not None:
            without = self._perhaps_replaced(parts)
            fuser(self._engine, show_progress, vectors=vectors, without=without)

    def noted(self, documents: Iterable[str]) -> list[Part]:
        engine, parts = self._engine, list[Part]()
        for document in documents:
            noted = engine.documents.of(document)
            known = engine.index.texts() if noted else []
            parts += [(document, text) for text in known if engine.documents.text(text) in noted]
        return parts

    def forget(self, left: Sequence[Part], unused: Collection[str], documents: Collection[str] = ()) -> None:
        for document, text in left:
            if document is not None:
                self._engine.documents.discard(document, [text])
        # What another document has, ingested by whatever process, stays.
        self._engine.forget(self._engine.documents.unheld(unused))
        if documents:
            self._engine.forget_document(*documents)

    def warm(self, texts: Iterable[str], question: str | None, on_miss: OnMiss) -> None:
        from ..chunks import MIN_CHARS, canonical

        texts = [text for text in dict.fromkeys(texts) if len(canonical(text)) >= MIN_CHARS]
        self._engine.hint(texts, question)
        if on_miss == "ignore":
            return
        missing = [text for text in texts if not self._engine.knows(text)]
        if missing and on_miss == "background":
            self._engine.ensure_later(missing)
        elif missing:
            self._engine.ensure(missing)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _forget_replaced(self, source: str, parts: Iterable[Part]) -> None:
        engine = self._engine
        if not engine.composable:
            return
        now: dict[str, set[str]] = {}
        for document, text in parts:
            if document is not None:
                now.setdefault(document, set()).add(engine.library.key(text))
        with _lock:
            known = _ingested.setdefault(engine, {})
            gone: set[str] = set()
            for document, keys in now.items():
                replaced = known.get((source, document), frozenset()) - keys
                engine.documents.discard(document, filter(None, map(engine.index.text, replaced)))
                gone |= replaced
                known[source, document] = frozenset(keys)
            if gone:
                gone.difference_update(*known.values())
        # Another process may have ingested a document that has such a text, too.
        engine.forget(engine.documents.unheld(old for key in gone if (old := engine.index.text(key)) is not None))

    def _perhaps_replaced(self, parts: Iterable[Part]) -> list[str]:
        """What only these documents had, perhaps in an earlier process, and no longer have: it may soon be gone."""
        parts, documents = list(parts), self._engine.documents
        now = {documents.text(text) for _, text in parts}
        before = documents.only({document for document, _ in parts if document}) - now
        known = self._engine.index.texts() if before else []
        return [text for text in known if documents.text(text) in before]


def encode(engine: Engine, texts: Iterable[str], show_progress: bool = True) -> int:
    """Keep the KV of these chunks, with a progress bar once it takes over a second. How many were encoded now.

    What is finished when it is interrupted need not be done again.
    """
    texts = list(dict.fromkeys(texts))
    bar = tqdm(total=len(texts), desc="KV of chunks", unit="chunk", delay=1, disable=not show_progress)

    def progress(done: int) -> None:
        bar.update(done - bar.n)

    with bar:
        result = engine.ensure(texts, progress=progress)
    log.info("%d of %d chunks encoded now, %d left out", result.encoded, len(texts), len(result.skipped))
    for number, (_, reason) in enumerate(result.skipped, start=1):  # no text is logged
        log.debug("no KV of %d of %d chunks: %s", number, len(result.skipped), reason)
    return result.encoded
