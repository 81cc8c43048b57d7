"""The fused variants of a library's chunks: made and found."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

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
        """What there is of this chunk, () for the chunk by itself first; then the oldest this process saw."""
        with self._lock:
            return [(), *self._all().get(canonical(text), ())]

    def get(self, text: str, company: Company) -> ChunkKV | None:
        """This variant, or where it is gone the chunk by itself, or None."""
        with self._lock:
            key = self._all().get(canonical(text), {}).get(company)
        if key is not None:
            chunk = self._library.get(key)
            if chunk is not None:
                return chunk
            with self._lock:
                self._all().get(canonical(text), {}).pop(company, None)
        return self._library.get(self._library.key(text))

    def fuse(self, text: str, company: Sequence[str], keep: int) -> bool:
        """Compute and keep the chunk's KV behind ``company``, in this order; False if there is nothing to do.

        That is so when a variant with this company is there, and when no company is left. Of a company too long for the
        model's window the last ones are left out. Of more than ``keep`` variants of a chunk the oldest are dropped. The
        chunks' own KV is computed if need be. Raises what `Library.encode` raises.
        """
        chunk = self._library.ensure(text)
        others = self._fitting(chunk, [other for other in company if canonical(other) != chunk.text])
        before = tuple(other.text for other in others)
        if not before or before in self.of(chunk.text):
            return False
        self._make(chunk, others, keep)
        return True

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
                known, new = self._make(chunk, seen, keep, joint=True), new + bool(company)
            seen.append(known)
        return new

    def _fitting(self, chunk: ChunkKV | None, texts: Sequence[str]) -> list[ChunkKV]:
        """The chunks with these texts by themselves, each once, as many as the window has room for beside ``chunk``."""
        library = self._library
        room = library.backbone.window - len(library.prefix_ids) - (0 if chunk is None else len(chunk))
        fitting: list[ChunkKV] = []
        for text in dict.fromkeys(map(canonical, texts)):
            found = library.ensure(text)
            room -= len(found)
            if room < 0:
                break
            fitting.append(found)
        return fitting

    def _make(self, chunk: ChunkKV, company: Sequence[ChunkKV], keep: int, joint: bool = False) -> ChunkKV:
        if not company:
            return chunk
        library = self._library
        made = fused(library.encoder, library.backbone, chunk, company, library.prefix_kv)
        made = replace(made, joint=joint)
        key = library.key(made.text, made.company, joint)
        with self._lock:
            mine = self._all().setdefault(made.text, {})
            library.store.put(key, made)
            old = [mine.pop(made.company)] if made.company in mine else []
            mine[made.company] = key
            old += [mine.pop(other) for other in list(mine)[:-keep]]
        library.store.delete(old)
        return made

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
