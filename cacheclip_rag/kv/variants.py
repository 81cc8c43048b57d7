"""The fused variants of a library's chunks: made and found."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..chunks import ChunkKV, canonical
from ..errors import CacheClipError, ConfigurationError, StoreError
from .encode import fused
from .fit import Context, Fit
from .library import Library

_ERRORS = (CacheClipError, RuntimeError, MemoryError)
"""What may be wrong with one chunk and not with the next."""

_GONE = (
    "it, or a chunk that it was fused with, is not in the store any more: forgotten meanwhile, or evicted because the "
    "store is too small for all of them (disk_bytes)"
)


class FusedVariants:
    """Every chunk's KV as it came out behind other chunks, beside its KV by itself.

    Variants are entries of the library's store like any other, under a key that their context is part of, so the
    store may evict them, and other processes add some. Thread-safe.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._known: dict[str, dict[Context, str]] | None = None  # by text; keys in the order they came
        self._lock = threading.RLock()

    def of(self, text: str) -> list[Context]:
        """What there is of this chunk: () for the chunk by itself, then what the store had when this process looked,
        the least recently used first, then what was added, as it came.
        """
        with self._lock:
            return [(), *self._all().get(canonical(text), ())]

    def fitting(self, text: str, before: Sequence[str], fit: Fit) -> ChunkKV | None:
        """The chunk as it fits best behind the chunks ``before``, of what is still there; None where nothing is."""
        contexts = self.of(text)
        while context := fit.choose(contexts, before):
            if (chunk := self.get(text, context)) is not None:
                return chunk
            contexts.remove(context)
        return self.get(text, ())

    def get(self, text: str, context: Context) -> ChunkKV | None:
        """This variant, or None where it is gone, which is remembered; () is the chunk by itself."""
        if not context:
            return self._library.get(self._library.key(text))
        with self._lock:
            key = self._all().get(canonical(text), {}).get(context)
        if key is None:
            return None
        chunk = self._library.get(key)
        if chunk is None:
            with self._lock:
                self._all().get(canonical(text), {}).pop(context, None)
        return chunk

    def fuse(self, contexts: Mapping[str, Sequence[str]], keep: int) -> list[bool | Exception]:
        """Compute and keep each chunk's KV behind its context, in this order, all in one forward.

        For each, in turn: True, or False where there is nothing to do (a variant with this context is there, or no
        context is left), or why it could not be done: what `Library.encode` raises for it. Of a context too long for
        the model's window what does not fit is left out; of more than ``keep`` variants of a chunk, the oldest.
        The chunks' own KV is computed if need be. Where they are too much for the device together they are done one by
        one.
        """
        done: list[bool | Exception] = []
        todo: dict[tuple[str, Context], tuple[ChunkKV, list[ChunkKV]]] = {}
        for text, context in contexts.items():
            try:
                chunk = self._library.ensure(text)
                others = self._fitting(chunk, [other for other in context if canonical(other) != chunk.text])
            except _ERRORS as error:
                done.append(error)
                continue
            variant = chunk.text, tuple(other.text for other in others)
            done.append(bool(others) and variant not in todo and not self._has(*variant))
            if done[-1]:
                todo[variant] = chunk, others
        try:
            made = self._make(list(todo.values()), keep) if todo else []
        except _ERRORS as error:
            if len(contexts) == 1:
                return [error]
            return [self.fuse({text: context}, keep)[0] for text, context in contexts.items()]
        kept = iter(made)
        return [StoreError(_GONE) if now is True and next(kept) is None else now for now in done]

    def fuse_in_order(self, texts: Sequence[str], keep: int) -> int:
        """Compute these chunks as one text behind the prefix and keep each one's KV, its context all those before it.

        That is what a prompt of them leaves, for the cost of one prefill: every chunk sees those before it as they are
        in a prompt, and not by themselves as in `fuse`, whose variants of the same context give way to these. The
        first one's is what it is by itself. Chunks beyond the context length are left out. Returns how many variants
        are new; raises what `Library.encode` raises.
        """
        library = self._library
        seen: list[ChunkKV] = []
        new = 0
        for chunk in self._fitting(None, texts):
            context = tuple(other.text for other in seen)
            known = library.get(library.key(chunk.text, context, in_sequence=True))
            if known is None:
                [known] = self._make([(chunk, seen)], keep, in_sequence=True) if context else [chunk]
                if known is None:
                    raise StoreError(_GONE)
                new += bool(context)
            seen.append(known)
        return new

    def _fitting(self, chunk: ChunkKV | None, texts: Sequence[str]) -> list[ChunkKV]:
        """The chunks with these texts by themselves, each once, as many as the window has room for beside ``chunk``."""
        library = self._library
        room = library.backbone.context_length - len(library.prefix_ids) - (0 if chunk is None else len(chunk))
        fitting: list[ChunkKV] = []
        for text in dict.fromkeys(map(canonical, texts)):
            found = library.ensure(text)
            if len(found) > room:  # one that is too long is no reason to leave out those behind it
                continue
            room -= len(found)
            fitting.append(found)
        return fitting

    def held(self, text: str) -> list[Context]:
        """The contexts of the variants whose KV is in the store."""
        with self._lock:
            known = list(self._all().get(canonical(text), {}).items())
        return [context for context, key in known if key in self._library.store]

    def _has(self, text: str, context: Context) -> bool:
        """Whether this variant is there, or at the remote, from where it is then fetched."""
        with self._lock:
            key = self._all().get(text, {}).get(context)
        if key is not None and key in self._library.store:
            return True
        key = self._library.key(text, context)
        found = self._library.get(key) is not None
        if found:
            with self._lock:
                self._all().setdefault(text, {})[context] = key
        return found

    def _make(
        self, chunks: Sequence[tuple[ChunkKV, Sequence[ChunkKV]]], keep: int, in_sequence: bool = False
    ) -> list[ChunkKV | None]:
        """The fused chunks; None for one of which, or of whose context, another process has forgotten something
        meanwhile: forgetting removes chunks by themselves before it looks for what was computed with them.
        """
        library = self._library
        if (changed := library.changed()) is not None:
            raise ConfigurationError(changed)
        texts, contexts = zip(*chunks, strict=True)
        made = fused(library.encoder, library.backbone, texts, contexts, library.prefix_kv)
        made = [replace(chunk, in_sequence=in_sequence) for chunk in made]
        old: list[str] = []
        with self._lock:
            for chunk in made:
                key = library.key(chunk.text, chunk.context, in_sequence)
                mine = self._all().setdefault(chunk.text, {})
                library.store.put(key, chunk)
                replaced = mine.pop(chunk.context, key)
                old += [replaced] if replaced != key else []  # the same key: its KV had gone, and came again
                mine[chunk.context] = key
                if library.keeps(key):  # else what is there is all that a later process finds
                    old += [mine.pop(other) for other in list(mine)[:-keep]]
        library.store.delete(old)
        if not library.shared:
            return list(made)
        library.store.refresh()
        kept = [all(text in library for text in (chunk.text, *chunk.context)) for chunk in made]
        for chunk, is_kept in zip(made, kept, strict=True):
            if not is_kept:
                library.store.delete([library.key(chunk.text, chunk.context, in_sequence)])
                with self._lock:
                    self._all().get(chunk.text, {}).pop(chunk.context, None)
        return [chunk if is_kept else None for chunk, is_kept in zip(made, kept, strict=True)]

    def refresh(self) -> None:
        """Look again what the store has."""
        with self._lock:
            self._known = None

    def _all(self) -> dict[str, dict[Context, str]]:
        if self._known is None:
            self._known = {}
            for entry in self._library.store.entries():
                mine = self._known.setdefault(entry.text, {}) if entry.context else {}
                if entry.in_sequence or entry.context not in mine:  # of the same context, the one that has seen more
                    mine[entry.context] = entry.key
        return self._known
