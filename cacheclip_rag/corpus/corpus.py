"""The chunks an engine knows: encoded, kept, found again and forgotten."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from ..background import Background
from ..chunks import canonical
from ..errors import CacheClipError, ConfigurationError, StoreError
from ..interrupts import raised_by_signal
from ..kv.collections import Collections
from ..kv.library import Library
from ..methods import Method
from ..serving.limit import RequestLimit
from ..serving.lock import FairLock
from ..store import Place
from .batches import batch_characters, batches, with_progress
from .usage import Usage

log = logging.getLogger("cacheclip_rag")

T = TypeVar("T")

_NOT_KEPT = "the store did not keep it"
_WAIT = 10.0
"""Seconds that background work gives way to requests; where there is always one, it is done in between."""


class Task(NamedTuple):
    """What is done when no request is being served: encode a chunk, or fuse it with those it came with."""

    text: str
    method: Method
    fuse: bool = False


@dataclass
class Ensured:
    """What `Engine.ensure` did: keys of chunks whose KV is kept, how many were encoded now, what was left out."""

    keys: list[str] = field(default_factory=list)
    encoded: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """``(beginning of the text, reason)`` of chunks without KV; prompts with them are prefilled as usual."""

    def skip(self, texts: Iterable[str], reason: str) -> None:
        self.skipped += [(text[:40], reason) for text in texts]


class Corpus:
    """Encodes, keeps and forgets chunks, in the foreground and while nothing is asked.

    ``lock`` is the model's, ``limit`` tells whether requests are in flight. ``collections`` hold what is kept,
    ``place`` where. Thread-safe.
    """

    def __init__(
        self, collections: Collections, place: Place, usage: Usage, lock: FairLock, limit: RequestLimit
    ) -> None:
        self.collections, self.index, self.documents, self.usage = (
            collections,
            collections.index,
            place.documents,
            usage,
        )
        self.background = Background(self._do_later)
        self.fuse_later: Callable[[Task], object] = lambda task: None
        """What is done for a task that fuses."""
        self._place, self._lock, self._limit = place, lock, limit
        self._obstacle = collections.backbone.obstacle

    # ---- encode ---------------------------------------------------------------------------------------------------

    def ensure(
        self,
        texts: Iterable[str],
        method: Method,
        progress: Callable[[int], None] | None = None,
        document: str | None = None,
    ) -> Ensured:
        """Keep the KV of these chunks, encoded as ``method`` wants it (see `Engine.ensure`)."""
        result, texts = Ensured(), require_list(texts)
        if document is not None:
            texts = list(texts)
            try:
                self.documents.add(document, texts)
            except StoreError as error:  # what is stored now could not be forgotten with its document
                result.skip(texts, str(error))
                return result
        characters = batch_characters(self.collections.backbone.device)
        for batch in with_progress(batches(texts, characters), progress):
            with self.skipping(batch, result, "not encoded"):
                self._ensure_batch(batch, method, result)
        return result

    @contextmanager
    def skipping(self, texts: Sequence[str], result: Ensured, what: str) -> Iterator[None]:
        """What goes wrong with these chunks is noted in ``result`` and not raised."""
        try:
            yield
        except (CacheClipError, RuntimeError, MemoryError, OSError) as error:
            if raised_by_signal(error):
                raise
            log.warning("%d chunks %s: %s", len(texts), what, error)
            result.skip(texts, str(error))

    def _ensure_batch(
        self, texts: Sequence[str], method: Method, result: Ensured, wanted: Callable[[], bool] = lambda: True
    ) -> None:
        if self._obstacle is not None:
            for text in texts:  # a control token in a document is text, whoever prefills it
                self.index.add(canonical(text), canonical(text))
            result.skip(texts, self._obstacle)
        elif method.ahead:
            self._encode(texts, self.collections.of(method.encode).library, result, wanted)
        else:  # nothing to compute before the first prompt, but to be recognised there
            for text in texts:
                self.index.add(self.collections.name(text), text)
                result.keys.append(self.collections.name(text))

    def _encode(self, texts: Sequence[str], library: Library, result: Ensured, wanted: Callable[[], bool]) -> None:
        """``wanted`` is asked once this call has the lock: what was forgotten meanwhile must not come back."""
        keys = [library.key(text) for text in texts]
        if all(self._settled(key, text, library) for key, text in zip(keys, texts, strict=True)):
            result.keys += keys
            return
        with self._lock:  # nothing of it can be forgotten meanwhile
            if not wanted():
                return
            made, refused = self._encode_missing(dict(zip(keys, texts, strict=True)), library)
        for key, text in zip(keys, texts, strict=True):
            if key in refused:
                log.warning("chunk not encoded: %s", refused[key])
                result.skip([text], refused[key])
            else:
                result.keys.append(key)
        result.encoded += made - len(refused)

    def _encode_missing(self, texts: dict[str, str], library: Library) -> tuple[int, dict[str, str]]:
        """Encode those of ``texts``, by key, whose KV is not there: how many that were, and by key why some failed."""
        missing = {
            key: text for key, text in texts.items() if not self._held(key, text, library) and library.get(key) is None
        }
        made = dict(zip(missing, library.ensure_each(list(missing.values())), strict=True))
        refused = {key: str(chunk) for key, chunk in made.items() if isinstance(chunk, Exception)}
        refused |= {key: _NOT_KEPT for key in made if key not in refused and not library.keeps(key)}
        # What a full disk refuses may still be in memory, and serve prompts as long as this process lives.
        kept = [text for key, text in texts.items() if key not in refused or key in library.store]
        for text in kept:
            self.index.add(self.collections.name(text), canonical(text))
        if (auxiliary := self.collections.auxiliary) is not None:  # a chunk that it cannot take is scored 0 later
            auxiliary.ensure_each([text for text in kept if text not in auxiliary])
        return len(made), refused

    def _settled(self, key: str, text: str, library: Library) -> bool:
        """Whether there is nothing left to do for this chunk, so that the lock need not be waited for."""
        auxiliary = self.collections.auxiliary
        return self._held(key, text, library) and (auxiliary is None or text in auxiliary)

    def _held(self, key: str, text: str, library: Library) -> bool:
        return self.index.text(self.collections.name(text)) is not None and key in library.store

    # ---- in the background ------------------------------------------------------------------------------------------

    def ensure_later(self, texts: Iterable[str], method: Method) -> None:
        """Like `ensure`, in the background, while no request is being served."""
        texts = require_list(texts)
        if self._obstacle is None:
            self.background.add(Task(text, method) for text in texts)

    def _do_later(self, task: Task) -> None:
        patience = time.monotonic() + _WAIT
        while not self._limit.at_rest and time.monotonic() < patience:
            if self.background.ending():
                return
            time.sleep(0.02)
        if task.fuse:
            self.fuse_later(task)
            return
        result = Ensured()
        with self.skipping([task.text], result, "not encoded"):
            self._ensure_batch([task.text], task.method, result, wanted=self.background.wanted)

    def flush(self) -> None:
        """Wait until everything that waits in the background is done, and is at the remote store if there is one."""
        self.background.flush()
        self.usage.save()
        self._place.settle()

    def close(self) -> None:
        """Stop background work, but for uploads, which are waited for."""
        self.background.close()
        self.usage.save()
        self._place.settle()

    # ---- forget -----------------------------------------------------------------------------------------------------

    def forget(self, texts: Iterable[str]) -> None:
        """Drop the KV of these chunks and whatever was computed behind them (see `Engine.forget`)."""
        if gone := list(require_list(texts)):
            self._forget(gone)
            opened = [library.namespace for library in self._libraries()]
            self._place.forget_elsewhere(set(map(self.documents.text, gone)), opened)
            self.documents.drop(gone)

    def forget_document(self, *documents: str) -> None:
        """Drop what `ensure` kept of these documents and of no others (see `Engine.forget_document`)."""
        if wanted := self.documents.only(documents):
            self._forget([text for text in self.index.texts() if self.documents.text(text) in wanted])
            self._place.forget_everywhere(wanted)
        self.documents.remove(documents)

    def _forget(self, gone: Sequence[str]) -> None:
        unwanted = {canonical(text) for text in gone}
        if self._obstacle is not None:
            for text in unwanted:
                self.index.remove(text)
            return
        self.background.drop(lambda task: canonical(task.text) in unwanted)
        with self._lock:  # a prompt on its way would leave behind what it harvests
            self.usage.forget([self.collections.name(text) for text in gone])
            self.collections.forget(gone, unwanted)

    def follow(self) -> None:
        """Take note of what other processes did. What they forgot must not be found, nor encoded again, here."""
        if lost := set(self.collections.follow()):
            self.background.drop(lambda task: canonical(task.text) in lost)

    def _libraries(self) -> list[Library]:
        return [] if self._obstacle is not None else self.collections.libraries()


def require_list(texts: Iterable[T]) -> Iterable[T]:
    """These; raises `ConfigurationError` for one text, whose characters would be taken for texts."""
    if isinstance(texts, str):
        raise ConfigurationError("chunks are given as several texts, not as one: [text]")
    return texts
