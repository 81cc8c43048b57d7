"""The chunks of one engine: encoding and storing them, in the foreground and in the background, and forgetting."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from ..background import Background
from ..chunks import canonical
from ..compute import on_cpu
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
_FULL = "the store is full: it would only evict another chunk (raise disk_bytes)"
_EVICTED = "the store is full: another process evicted it again"
_WAIT = 10.0
"""Seconds that background work waits for requests to end; where there is always one, it runs between them."""


class Task(NamedTuple):
    """Work for idle time: encode a chunk, or fuse it with the chunks it is used with, or fuse a ``sequence`` of chunks,
    by their names in the index, in this order.

    ``again``: the chunk was known when the task was made, so that it may be forgotten in the meantime.
    """

    text: str
    method: Method
    fuse: bool = False
    again: bool = False
    sequence: tuple[str, ...] = ()


@dataclass
class Ensured:
    """The result of `Engine.ensure`: the keys of stored chunks, how many were encoded now, and what was skipped."""

    keys: list[str] = field(default_factory=list)
    encoded: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """``(beginning of the text, reason)`` of chunks without KV; prompts with them are prefilled as usual."""
    reasons: dict[str, str] = field(default_factory=dict)
    """The reasons of ``skipped`` by the whole text, for callers that have to tell which of their chunks it was."""
    removed: int = 0
    """How many chunks the document no longer has; of `Engine.replace_document` only."""

    @property
    def not_kept(self) -> int:
        """How many of the skipped chunks the store did not keep."""
        return sum(reason in (_NOT_KEPT, _FULL, _EVICTED) for _, reason in self.skipped)

    def skip(self, texts: Iterable[str], reason: str) -> None:
        for text in texts:
            self.skipped.append((text[:40], reason))
            self.reasons[text] = reason


class Corpus:
    """Encodes, stores and forgets chunks, in the foreground and in idle time.

    ``collections`` holds the stored chunks, ``place`` says where they are stored; ``lock`` is held while the model
    computes, and background work waits until ``limit`` has no request in flight. Thread-safe.
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
        """Called for a task that fuses."""
        self.on_forget: list[Callable[[Collection[str]], object]] = []
        """Called with the names that the index had for chunks that were forgotten, here or by another process."""
        self._place, self._lock, self._limit = place, lock, limit
        self._obstacle = collections.backbone.obstacle

    # ---- encode ---------------------------------------------------------------------------------------------------

    @on_cpu
    def ensure(
        self,
        texts: Iterable[str],
        method: Method,
        progress: Callable[[int], None] | None = None,
        document: str | None = None,
    ) -> Ensured:
        """Compute and store the KV of these chunks, encoded as ``method`` wants it (see `Engine.ensure`)."""
        result, texts = Ensured(), require_list(texts)
        if document is not None:
            texts = list(texts)
            try:
                self.documents.add(document, texts)
            except StoreError as error:  # chunks stored now could not be forgotten with their document
                result.skip(texts, str(error))
                return result
        characters = batch_characters(self.collections.backbone.device)
        with self._held_in_store(method, result) as hold:
            if isinstance(texts, Collection):  # an iterator may yield more than fits into memory
                hold(texts)
            for batch in with_progress(batches(texts, characters), progress):
                hold(batch)
                with self.skipping(batch, result, "not encoded"):
                    self._ensure_batch(batch, method, result)
        return result

    @contextmanager
    def _held_in_store(self, method: Method, result: Ensured) -> Iterator[Callable[[Iterable[str]], None]]:
        """Yields a function that takes texts: in the block, this process evicts none of them for another one. Chunks
        that another process evicted meanwhile are moved to the skipped ones of ``result``.
        """
        if self._obstacle is not None or not method.ahead:
            yield lambda texts: None
            return
        library, auxiliary = self.collections.of(method.encode).library, self.collections.auxiliary
        libraries = (library,) if auxiliary is None else (library, auxiliary)
        known: dict[str, str] = {}
        with ExitStack() as held:

            def hold(texts: Iterable[str]) -> None:
                new = {key: text for text in texts if (key := library.key(text)) not in known}
                known.update(new)
                for each in libraries if new else ():
                    held.enter_context(each.store.holding([each.key(text) for text in new.values()]))

            yield hold
        library.store.refresh()
        if lost := {key for key in result.keys if not library.keeps(key)}:
            result.keys = [key for key in result.keys if key not in lost]
            for key in lost:
                result.skip([known[key]], _NOT_KEPT if key in library.store else _EVICTED)

    @contextmanager
    def skipping(self, texts: Sequence[str], result: Ensured, what: str) -> Iterator[None]:
        """Turn errors in the block into skipped chunks of ``result``."""
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
            for text in texts:  # known documents matter to plain prefill, too: control tokens in them are plain text
                self.index.add(canonical(text), canonical(text))
            result.skip(texts, self._obstacle)
        elif method.ahead:
            self._encode(texts, self.collections.of(method.encode).library, result, wanted)
        else:  # nothing to compute ahead, but chunks must be recognised in prompts
            with self._lock:  # as in `_encode`
                if not wanted():
                    return
                for text in texts:
                    self.index.add(self.collections.name(text), text)
                    result.keys.append(self.collections.name(text))

    def _encode(self, texts: Sequence[str], library: Library, result: Ensured, wanted: Callable[[], bool]) -> None:
        """``wanted`` is called under the lock: chunks forgotten while waiting must not be encoded again."""
        keys = [library.key(text) for text in texts]
        if all(self._settled(key, text, library) for key, text in zip(keys, texts, strict=True)):
            result.keys += keys
            return
        with self._lock:  # none of the chunks can be forgotten while it is held
            if not wanted():
                return
            encoded, refused = self._encode_missing(dict(zip(keys, texts, strict=True)), library)
        for key, text in zip(keys, texts, strict=True):
            if key in refused:
                log.warning("chunk not encoded: %s", refused[key])
                result.skip([text], refused[key])
            else:
                result.keys.append(key)
        result.encoded += encoded

    def _encode_missing(self, texts: dict[str, str], library: Library) -> tuple[int, dict[str, str]]:
        """Encode those of ``texts`` (by key) that have no KV and fit into the store.

        Returns how many were encoded and stored, and the reasons for the others by key.
        """
        missing = {
            key: text for key, text in texts.items() if not self._held(key, text, library) and library.get(key) is None
        }
        fitting = library.store.fitting(list(missing.values()))
        full, missing = list(missing)[fitting:], dict(list(missing.items())[:fitting])
        made = dict(zip(missing, library.ensure_each(list(missing.values())), strict=True))
        refused = {key: str(chunk) for key, chunk in made.items() if isinstance(chunk, Exception)}
        refused |= {key: _NOT_KEPT for key in made if key not in refused and not library.keeps(key)}
        encoded = len(made) - len(refused)
        refused |= dict.fromkeys(full, _FULL)
        # A chunk that a full disk refuses may still be in memory, and serve prompts while this process lives.
        kept = [text for key, text in texts.items() if key not in refused or key in library.store]
        for text in kept:
            self.index.add(self.collections.name(text), canonical(text))
        if (auxiliary := self.collections.auxiliary) is not None:  # a chunk that it cannot encode scores 0 later
            auxiliary.ensure_each([text for text in kept if text not in auxiliary])
        return encoded, refused

    def _settled(self, key: str, text: str, library: Library) -> bool:
        """Whether nothing is left to do for this chunk, so that there is no need to wait for the lock."""
        auxiliary = self.collections.auxiliary
        return self._held(key, text, library) and (auxiliary is None or text in auxiliary)

    def _held(self, key: str, text: str, library: Library) -> bool:
        return self.index.text(self.collections.name(text)) is not None and key in library.store

    # ---- in the background ------------------------------------------------------------------------------------------

    def ensure_later(self, texts: Iterable[str], method: Method) -> None:
        """Like `ensure`, in the background, while no request is being served."""
        texts = require_list(texts)
        if self._obstacle is None:
            self.background.add(Task(text, method, again=self._is_known(text)) for text in texts)

    def _is_known(self, text: str) -> bool:
        return self.collections.name(text) in self.index

    def encode_again(self, names: Iterable[str], method: Method) -> None:
        """Queue chunks, by their names in the index, whose KV a prefill did not find in the store."""
        with self._lock:
            self.follow()  # the KV of a forgotten chunk is not found either
        gone = [text for name in names if (text := self.index.text(name)) is not None]
        self.background.add(Task(text, method, again=True) for text in gone)

    def rests(self) -> bool:
        """For background work: waits until no request is being served. False if there was one all the while, or this
        is being closed.
        """
        return self._limit.wait_for_rest(_WAIT, self.background.ending) and not self.background.ending()

    @on_cpu
    def _do_later(self, task: Task) -> None:
        if not self._limit.wait_for_rest(_WAIT, self.background.ending) and self.background.ending():
            return
        if task.fuse or task.sequence:
            self.fuse_later(task)
            return
        result, before = Ensured(), self._place.forgettings()

        def wanted() -> bool:
            self.follow()
            return self.background.wanted() and (not task.again or self._is_known(task.text))

        with self.skipping([task.text], result, "not encoded"):
            self._ensure_batch([task.text], task.method, result, wanted)
            if task.again and result.encoded and self._place.forgettings() != before:
                with self._lock:  # perhaps it was this chunk that another process forgot meanwhile
                    self.index.remove(self.collections.name(task.text))
                    for library in self._libraries():
                        library.store.delete([library.key(task.text)])

    def flush(self) -> None:
        """Wait until all background work is done, and uploaded if there is a remote store."""
        self.background.flush()
        self.usage.save()
        self._place.settle()

    def close(self) -> None:
        """Stop background work, after waiting for uploads."""
        self.background.close()
        self.usage.save()
        self._place.settle()

    # ---- forget -----------------------------------------------------------------------------------------------------

    def forget(self, texts: Iterable[str]) -> None:
        """Delete the KV of these chunks and all KV computed with them in its context (see `Engine.forget`)."""
        if gone := list(require_list(texts)):
            digests = set(map(self.documents.text, gone))
            _all_of(lambda: self._forget(gone), lambda: self._place.forget_elsewhere(digests))
            self.documents.drop(gone)

    def forget_document(self, *documents: str) -> None:
        """Delete the chunks of these documents, unless others have them as well (see `Engine.forget_document`)."""
        self._forget_digests(self.documents.only(documents))
        self.documents.remove(documents)

    def replace_document(
        self, document: str, texts: Iterable[str], method: Method, progress: Callable[[int], None] | None = None
    ) -> Ensured:
        """Let a document have these chunks and no others (see `Engine.replace_document`).

        What is new is noted before it is stored, and what has vanished is forgotten before the note of it goes, so that
        a repetition finds whatever an interruption left.
        """
        texts = list(require_list(texts))
        vanished = self.documents.of(document) - set(map(self.documents.text, texts))
        self.documents.add(document, texts)
        result = self.ensure(texts, method, progress)
        self._forget_digests(self.documents.only([document]) & vanished)
        self.documents.release(document, vanished)
        result.removed = len(vanished)
        return result

    def _forget_digests(self, wanted: frozenset[str]) -> None:
        """``wanted``: as `Documents.text` makes them. For all models, and at the remote."""
        if wanted:
            gone = [text for text in self.index.texts() if self.documents.text(text) in wanted]
            _all_of(lambda: self._forget(gone), lambda: self._place.forget_everywhere(wanted))

    def _forget(self, gone: Sequence[str]) -> None:
        unwanted = {canonical(text) for text in gone}
        if self._obstacle is not None:
            for text in unwanted:
                self.index.remove(text)
            return
        self._drop_tasks(unwanted)
        names = [self.collections.name(text) for text in gone]
        with self._lock:  # otherwise a prefill in progress could harvest them again
            self.usage.forget(names)
            try:
                self.collections.forget(gone, unwanted)
            finally:
                self._tell(names)

    def follow(self) -> None:
        """Catch up with other processes' changes to the store. What they forgot is dropped here as well, and not
        encoded again.
        """
        if lost := set(self.collections.follow()):
            self._drop_tasks(lost)
            self._tell([self.collections.name(text) for text in lost])

    def _tell(self, names: Collection[str]) -> None:
        for tell in self.on_forget:
            tell(names)

    def _drop_tasks(self, gone: Collection[str]) -> None:
        names = {self.collections.name(text) for text in gone}
        self.background.drop(lambda task: canonical(task.text) in gone or not names.isdisjoint(task.sequence))

    def _libraries(self) -> list[Library]:
        return [] if self._obstacle is not None else self.collections.libraries()


def require_list(texts: Iterable[T]) -> Iterable[T]:
    """Returns ``texts``. Raises `ConfigurationError` for a single text, whose characters would pass for texts."""
    if isinstance(texts, str):
        raise ConfigurationError("chunks are given as several texts, not as one: [text]")
    return texts


def _all_of(*steps: Callable[[], object]) -> None:
    """Take every step, then raise a `StoreError` that says what each of them could not do."""
    failures = []
    for step in steps:
        try:
            step()
        except StoreError as error:
            failures.append(error)
    if failures:
        raise StoreError("; ".join(dict.fromkeys(map(str, failures)))) from failures[0]
