"""The fused variants of a library's chunks: made, found and forgotten."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ..chunks import ChunkKV, canonical
from ..encode import fused
from ..library import Library
from .fit import Company


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
        """What there is of this chunk, the oldest first: always () for the chunk by itself."""
        with self._lock:
            return [(), *self._all().get(canonical(text), ())]

    def get(self, text: str, company: Company) -> ChunkKV | None:
        """This variant, or where it is gone the chunk by itself, or None."""
        chunk = self._library.get(self._library.key(text, company))
        if chunk is None and company:
            with self._lock:
                self._all().get(canonical(text), {}).pop(company, None)
            chunk = self._library.get(self._library.key(text))
        return chunk

    def fuse(self, text: str, company: Sequence[str], keep: int) -> bool:
        """Compute and keep the chunk's KV behind ``company``, in this order; False if there is nothing to do.

        That is so when the variant is there, and when no company is left. Of a company too long for the model's window
        the last ones are left out. Of more than ``keep`` variants of a chunk the oldest are dropped. The chunks' own KV
        is computed if need be. Raises what `Library.encode` raises.
        """
        library = self._library
        chunk = library.ensure(text)
        room = library.backbone.window - len(library.prefix_ids) - len(chunk)
        others: list[ChunkKV] = []
        for other in dict.fromkeys(map(canonical, company)):
            if other == chunk.text:
                continue
            found = library.ensure(other)
            room -= len(found)
            if room < 0:
                break
            others.append(found)
        kept = tuple(other.text for other in others)
        if not kept or kept in self.of(chunk.text):
            return False
        self._keep(fused(library.encoder, library.backbone, chunk, others, library.prefix_kv), keep)
        return True

    def fuse_in_order(self, texts: Sequence[str], keep: int) -> int:
        """Compute these chunks as one text behind the prefix and keep each one's KV, its company all those before it.

        That is what a prompt of them leaves, for the cost of one prefill: every chunk has seen those before it as they
        are in company, and not by themselves as in `fuse`. The first one's is what it is by itself. Chunks beyond the
        model's window are left out. Returns how many variants are new; raises what `Library.encode` raises.
        """
        library = self._library
        room = library.backbone.window - len(library.prefix_ids)
        before: list[ChunkKV] = []
        made = 0
        for text in dict.fromkeys(map(canonical, texts)):
            chunk = library.ensure(text)
            room -= len(chunk)
            if room < 0:
                break
            company = tuple(other.text for other in before)
            seen = library.get(library.key(chunk.text, company))
            if seen is None:
                seen = fused(library.encoder, library.backbone, chunk, before, library.prefix_kv)
                self._keep(seen, keep)
                made += 1
            before.append(seen)
        return made

    def _keep(self, made: ChunkKV, keep: int) -> None:
        key = self._library.key(made.text, made.company)
        self._library.store.put(key, made)
        with self._lock:
            mine = self._all().setdefault(made.text, {})
            mine[made.company] = key
            old = [mine.pop(company) for company in list(mine)[:-keep]]
        self._library.store.delete(old)

    def forget(self, text: str) -> None:
        """Drop the chunk's variants, and those of others that were computed behind it."""
        text, gone = canonical(text), []
        with self._lock:
            self.refresh()  # another process may have fused more
            for mine, variants in list(self._all().items()):
                unwanted = [company for company in variants if mine == text or text in company]
                gone += [variants.pop(company) for company in unwanted]
        self._library.store.delete(gone)

    def refresh(self) -> None:
        """Look again what the store has."""
        with self._lock:
            self._known = None

    def _all(self) -> dict[str, dict[Company, str]]:
        if self._known is None:
            self._known = {}
            for entry in self._library.store.entries():
                if entry.company:
                    self._known.setdefault(entry.text, {})[entry.company] = entry.key
        return self._known
