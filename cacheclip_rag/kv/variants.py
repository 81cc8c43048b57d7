"""The fused variants of a library's chunks: made and found."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..chunks import ChunkKV, canonical
from ..errors import CacheClipError, StoreError
from .encode import fused
from .fit import Company, Fit
from .library import Library

_ERRORS = (CacheClipError, RuntimeError, MemoryError)
"""What may be wrong with one chunk and not with the next."""

_GONE = (
    "it, or a chunk that it was fused with, is not in the store any more: forgotten meanwhile, or evicted because the "
    "store is too small for all of them (disk_bytes)"
)


class FusedVariants:
    """Every chunk's KV as it came out behind other chunks, beside its KV by itself.

    Variants are entries of the library's store like any other, under a key that their company is part of, so the store
    may evict them, and other processes add some. Thread-safe.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._known: dict[str, dict[Company, str]] | None = None  # by text; keys in the order they came
        self._lock = threading.RLock()

    def of(self, text: str) -> list[Company]:
        """What there is of this chunk: () for the chunk by itself, then what the store had when this process looked,
        the least recently used first, then what was added, as it came.
        """
        with self._lock:
            return [(), *self._all().get(canonical(text), ())]

    def fitting(self, text: str, before: Sequence[str], fit: Fit) -> ChunkKV | None:
        """The chunk as it fits best behind the chunks ``before``, of what is still there; None where nothing is."""
        companies = self.of(text)
        while company := fit.choose(companies, before):
            if (chunk := self.get(text, company)) is not None:
                return chunk
            companies.remove(company)
        return self.get(text, ())

    def get(self, text: str, company: Company) -> ChunkKV | None:
        """This variant, or None where it is gone, which is remembered; () is the chunk by itself."""
        if not company:
            return self._library.get(self._library.key(text))
        with self._lock:
            key = self._all().get(canonical(text), {}).get(company)
        if key is None:
            return None
        chunk = self._library.get(key)
        if chunk is None:
            with self._lock:
                self._all().get(canonical(text), {}).pop(company, None)
        return chunk

    def fuse(self, companies: Mapping[str, Sequence[str]], keep: int) -> list[bool | Exception]:
        """Compute and keep each chunk's KV behind its company, in this order, all in one forward.

        For each, in turn: True, or False where there is nothing to do (a variant with this company is there, or no
        company is left), or why it could not be done: what `Library.encode` raises for it. Of a company too long for
        the model's window what does not fit is left out; of more than ``keep`` variants of a chunk, the oldest.
        The chunks' own KV is computed if need be. Where they are too much for the device together they are done one by
        one.
        """
        done: list[bool | Exception] = []
        todo: dict[tuple[str, Company], tuple[ChunkKV, list[ChunkKV]]] = {}
        for text, company in companies.items():
            try:
                chunk = self._library.ensure(text)
                others = self._fitting(chunk, [other for other in company if canonical(other) != chunk.text])
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
            if len(companies) == 1:
                return [error]
            return [self.fuse({text: company}, keep)[0] for text, company in companies.items()]
        kept = iter(made)
        return [StoreError(_GONE) if now is True and next(kept) is None else now for now in done]

    def fuse_in_order(self, texts: Sequence[str], keep: int) -> int:
        """Compute these chunks as one text behind the prefix and keep each one's KV, its company all those before it.

        That is what a prompt of them leaves, for the cost of one prefill: every chunk sees those before it as they are
        in company, and not by themselves as in `fuse`, whose variants of the same company give way to these. The first
        one's is what it is by itself. Chunks beyond the model's window are left out. Returns how many variants are new;
        raises what `Library.encode` raises.
        """
        library = self._library
        seen: list[ChunkKV] = []
        new = 0
        for chunk in self._fitting(None, texts):
            company = tuple(other.text for other in seen)
            known = library.get(library.key(chunk.text, company, joint=True))
            if known is None:
                [known] = self._make([(chunk, seen)], keep, joint=True) if company else [chunk]
                if known is None:
                    raise StoreError(_GONE)
                new += bool(company)
            seen.append(known)
        return new

    def _fitting(self, chunk: ChunkKV | None, texts: Sequence[str]) -> list[ChunkKV]:
        """The chunks with these texts by themselves, each once, as many as the window has room for beside ``chunk``."""
        library = self._library
        room = library.backbone.window - len(library.prefix_ids) - (0 if chunk is None else len(chunk))
        fitting: list[ChunkKV] = []
        for text in dict.fromkeys(map(canonical, texts)):
            found = library.ensure(text)
            if len(found) > room:  # one that is too long is no reason to leave out those behind it
                continue
            room -= len(found)
            fitting.append(found)
        return fitting

    def held(self, text: str) -> list[Company]:
        """The companies of the variants whose KV is in the store."""
        with self._lock:
            known = list(self._all().get(canonical(text), {}).items())
        return [company for company, key in known if key in self._library.store]

    def _has(self, text: str, company: Company) -> bool:
        """Whether this variant is there, or at the remote, from where it is then fetched."""
        with self._lock:
            key = self._all().get(text, {}).get(company)
        if key is not None and key in self._library.store:
            return True
        key = self._library.key(text, company)
        found = self._library.get(key) is not None
        if found:
            with self._lock:
                self._all().setdefault(text, {})[company] = key
        return found

    def _make(
        self, chunks: Sequence[tuple[ChunkKV, Sequence[ChunkKV]]], keep: int, joint: bool = False
    ) -> list[ChunkKV | None]:
        """The fused chunks; None for one of which, or of whose company, another process has forgotten something
        meanwhile: forgetting removes chunks by themselves before it looks for what was computed with them.
        """
        library = self._library
        texts, companies = zip(*chunks, strict=True)
        made = fused(library.encoder, library.backbone, texts, companies, library.prefix_kv)
        made = [replace(chunk, joint=joint) for chunk in made]
        old: list[str] = []
        with self._lock:
            for chunk in made:
                key = library.key(chunk.text, chunk.company, joint)
                mine = self._all().setdefault(chunk.text, {})
                library.store.put(key, chunk)
                replaced = mine.pop(chunk.company, key)
                old += [replaced] if replaced != key else []  # the same key: its KV had gone, and came again
                mine[chunk.company] = key
                if library.keeps(key):  # else what is there is all that a later process finds
                    old += [mine.pop(other) for other in list(mine)[:-keep]]
        library.store.delete(old)
        if not library.shared:
            return list(made)
        library.store.refresh()
        kept = [all(text in library for text in (chunk.text, *chunk.company)) for chunk in made]
        for chunk, is_kept in zip(made, kept, strict=True):
            if not is_kept:
                library.store.delete([library.key(chunk.text, chunk.company, joint)])
                with self._lock:
                    self._all().get(chunk.text, {}).pop(chunk.company, None)
        return [chunk if is_kept else None for chunk, is_kept in zip(made, kept, strict=True)]

    def refresh(self) -> None:
        """Look again what the store has."""
        with self._lock:
            self._known = None

    def _all(self) -> dict[str, dict[Company, str]]:
        if self._known is None:
            self._known = {}
            for entry in self._library.store.entries():
                mine = self._known.setdefault(entry.text, {}) if entry.company else {}
                if entry.joint or entry.company not in mine:  # of the same company, the one that has seen more
                    mine[entry.company] = entry.key
        return self._known
