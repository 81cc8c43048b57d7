"""The fused variants of a library's chunks: computing, storing and choosing them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..chunks import ChunkKV, canonical
from ..errors import CacheClipError, ConfigurationError, StoreError
from .encode import fused
from .fit import Context, Fit
from .library import Library

_ERRORS = (CacheClipError, RuntimeError, MemoryError)
"""Errors that may concern one chunk and not the next."""

_GONE = (
    "it, or a chunk that it was fused with, is not in the store any more: forgotten meanwhile, or evicted because the "
    "store is too small for all of them (disk_bytes)"
)


class FusedVariants:
    """Variants of each chunk's KV, computed behind other chunks (FusionRAG), besides its KV in isolation.

    Variants are ordinary entries of the library's store, under a key that includes their context. So the store may
    evict them, and other processes may add some. Thread-safe.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._known: dict[str, dict[Context, str]] | None = (
            None  # by text; keys in the order they came, spare ones first
        )
        self._spare: set[str] = set()  # keys of those that were put into spare room, and that no prompt has taken yet
        self._lock = threading.RLock()

    def of(self, text: str) -> list[Context]:
        """The contexts of this chunk's variants: () for the isolated chunk, then those that the store had when this
        process listed it (the least recently used first), then those added since.
        """
        with self._lock:
            return [(), *self._all().get(canonical(text), ())]

    def fitting(self, text: str, before: Sequence[str], fit: Fit | None, tokens: int | None = None) -> ChunkKV | None:
        """The stored variant that fits best behind the chunks ``before``, with ``fit`` None the isolated chunk; None if
        the chunk has no KV at all. ``tokens`` as in `Library.get`, which may raise `NotWorthLoading`.
        """
        contexts = self.of(text) if fit is not None else []
        while fit is not None and (context := fit.choose(contexts, before)):
            if (chunk := self.get(text, context, tokens)) is not None:
                return chunk
            contexts.remove(context)
        return self.get(text, (), tokens)

    def get(self, text: str, context: Context, tokens: int | None = None) -> ChunkKV | None:
        """The variant with this context (() for the isolated chunk); None if it is gone, which is remembered.
        ``tokens`` as in `Library.get`.
        """
        key = self.key(text, context)
        chunk = None if key is None else self._library.get(key, tokens)
        if chunk is None and context:
            with self._lock:
                self._all().get(canonical(text), {}).pop(context, None)
        elif key in self._spare:
            with self._lock:
                self._spare.discard(key)
                mine = self._all().get(canonical(text), {})
                mine |= {context: mine.pop(context, key)}  # now it is the newest
        return chunk

    def key(self, text: str, context: Context) -> str | None:
        """The key of the variant with this context (() for the isolated chunk); None if there is none."""
        if not context:
            return self._library.key(text)
        with self._lock:
            return self._all().get(canonical(text), {}).get(context)

    def fuse(self, contexts: Mapping[str, Sequence[str]], keep: int) -> list[bool | Exception]:
        """Compute and store each chunk's KV behind its context, all in one forward.

        Returns, per chunk: True; False if there was nothing to do (the variant exists, or no context is left); or the
        exception that prevented it (those of `Library.encode`). Chunks of a context that exceed the model's context
        length are left out. Beyond ``keep`` variants of a chunk, the oldest are deleted. The chunks' own KV is computed
        if need be. If the forward fails, for example for lack of memory, they are computed one by one.
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
        """Compute these chunks as one text behind the encode prefix, and store each one's KV with all chunks before it
        as its context.

        It costs one prefill. Every chunk attends to the ones before it as in a prompt, and not to their isolated KV as
        in `fuse`; these variants replace those of `fuse` with the same context. The first chunk's KV is its KV in
        isolation. Chunks beyond the context length are left out. Returns how many variants are new; raises what
        `Library.encode` raises.
        """
        return sum(self.in_order(texts, keep))

    def in_order(self, texts: Sequence[str], keep: int, spare: bool = False) -> Iterator[bool]:
        """`fuse_in_order`, one chunk at a time: yields whether a new variant of it was stored.

        ``spare``: only into room for which nothing has to go, in the store and among the ``keep`` variants of a chunk;
        it ends where there is none. Until a prompt takes one of these variants, it is the first to go.
        """
        library, seen, texts = self._library, list[ChunkKV](), list(dict.fromkeys(map(canonical, texts)))
        if spare:  # up to the last one that there is something to store of
            while len(texts) > 1 and not self._has_room(texts[-1], tuple(texts[:-1]), keep):
                texts.pop()
            texts = texts if len(texts) > 1 else []
        for chunk in self._fitting(None, texts):
            context = tuple(other.text for other in seen)
            key = library.key(chunk.text, context, in_sequence=True)
            known, new = library.get(key), False
            if not spare:
                self._spare.discard(key)
            if known is None and spare and context and not self._has_room(chunk.text, context, keep):
                [known] = self._compute([(chunk, seen)])  # for those behind it
            elif known is None and context:
                if spare and library.store.spare_bytes() < chunk.nbytes:
                    return
                [known] = self._make([(chunk, seen)], keep, in_sequence=True, spare=spare)
                if spare and not library.keeps(key):
                    return
                new = True
            elif known is None:
                known = chunk
            if known is None:
                raise StoreError(_GONE)
            seen.append(known)
            yield new

    def _has_room(self, text: str, context: Context, keep: int) -> bool:
        """Whether a variant with this context is new, and its chunk has less than ``keep`` others that must stay."""
        with self._lock:
            mine = self._all().get(text, {})
            return context not in mine and len(set(mine.values()) - self._spare) < keep

    def _fitting(self, chunk: ChunkKV | None, texts: Sequence[str]) -> list[ChunkKV]:
        """The isolated chunks with these texts, each once, as many as the context length holds besides ``chunk``."""
        library = self._library
        room = library.backbone.context_length - len(library.prefix_ids) - (0 if chunk is None else len(chunk))
        fitting: list[ChunkKV] = []
        for text in dict.fromkeys(map(canonical, texts)):
            found = library.ensure(text)
            if len(found) > room:  # shorter ones behind it may still fit
                continue
            room -= len(found)
            fitting.append(found)
        return fitting

    def held(self, text: str) -> list[Context]:
        """The contexts of the variants whose KV is in the store now."""
        with self._lock:
            known = list(self._all().get(canonical(text), {}).items())
        return [context for context, key in known if key in self._library.store]

    def _has(self, text: str, context: Context) -> bool:
        """Whether this variant is stored; one at the remote is fetched."""
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

    def _compute(self, chunks: Sequence[tuple[ChunkKV, Sequence[ChunkKV]]]) -> list[ChunkKV]:
        library = self._library
        if (changed := library.changed()) is not None:
            raise ConfigurationError(changed)
        texts, contexts = zip(*chunks, strict=True)
        return fused(library.encoder, library.backbone, texts, contexts, library.prefix_kv)

    def _make(
        self,
        chunks: Sequence[tuple[ChunkKV, Sequence[ChunkKV]]],
        keep: int,
        in_sequence: bool = False,
        spare: bool = False,
    ) -> list[ChunkKV | None]:
        """Compute and store the fused chunks. None for a chunk if another process forgot it, or one of its context,
        meanwhile: forgetting deletes isolated chunks first, and then variants that were computed with them.
        """
        library = self._library
        made = [replace(chunk, in_sequence=in_sequence) for chunk in self._compute(chunks)]
        old: list[str] = []
        with self._lock:
            for chunk in made:
                key = library.key(chunk.text, chunk.context, in_sequence)
                mine = self._all().setdefault(chunk.text, {})
                put = library.store.put_spare if spare else library.store.put
                if not put(key, chunk) and spare:
                    continue
                replaced = mine.pop(chunk.context, key)
                old += [replaced] if replaced != key else []  # the same key: it was evicted and is stored again
                mine[chunk.context] = key
                if spare:
                    self._spare.add(key)
                    mine |= {other: mine.pop(other) for other in list(mine) if mine[other] not in self._spare}
                if library.keeps(key):  # if not, a later process finds only the old ones
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
        """Forget the list of variants, so that the store is listed again."""
        with self._lock:
            self._known = None

    def _all(self) -> dict[str, dict[Context, str]]:
        if self._known is None:
            self._known = {}
            for entry in self._library.store.entries():
                mine = self._known.setdefault(entry.text, {}) if entry.context else {}
                if entry.in_sequence or entry.context not in mine:  # of the same context, the one computed in sequence
                    mine[entry.context] = entry.key
            self._spare.intersection_update(key for mine in self._known.values() for key in mine.values())
        return self._known
