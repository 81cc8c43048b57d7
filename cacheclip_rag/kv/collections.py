"""The chunks of each encoding that an engine has in use."""

from __future__ import annotations

import threading
from collections.abc import Collection as Container
from collections.abc import Iterable, Iterator
from functools import cached_property

from ..errors import StoreError
from ..model.backbone import Backbone
from ..prompt import ChunkIndex
from ..store.place import Place
from .encode import Encoder, Harvested, HarvestedVariants
from .library import KVDtype, Library
from .preamble import PreambleCache
from .prefix_caching import PrefixCache, PrefixCaching
from .variants import FusedVariants


class Collection:
    """The chunks that are encoded in one way: each by itself (``library``), behind others (``variants``), and as
    finished prompts left it (``harvested``, for an encoder that harvests); and the ``preambles`` of prompts with them.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self.variants = FusedVariants(library)
        encoder = library.encoder
        self.harvested = HarvestedVariants(encoder) if isinstance(encoder, Harvested) else None
        self.preambles = PreambleCache()

    def drop(self, text: str, name: str) -> None:
        """Drop what is kept of a chunk; ``name`` is its key in the index."""
        self.library.store.delete([self.library.key(text)])
        self.preambles.clear()  # a chunk whose KV was missing was part of a prompt's preamble
        if self.harvested is not None:
            self.harvested.forget(name)


class Collections:
    """A `Collection` for each encoding, opened when it is first asked for: another encoding's KV is other KV.

    One ``index`` serves all of them, in which a chunk's name is its key in the `main` library. ``auxiliary`` is the
    library of the auxiliary model, whose chunks are kept and forgotten with the others.
    """

    def __init__(
        self, backbone: Backbone, encoder: Encoder, index: ChunkIndex, place: Place, kv_dtype: KVDtype = "auto"
    ) -> None:
        self.backbone, self.index = backbone, index
        self.auxiliary: Library | None = None
        self._encoder, self._place, self._kv_dtype = encoder, place, kv_dtype
        self._opened: dict[Encoder, Collection] = {}
        self._seen: dict[Collection, int] = {}
        self._prefix_caches: dict[PrefixCaching, PrefixCache] = {}
        self._lock = threading.Lock()

    @cached_property
    def main(self) -> Library:
        """The library of the engine's own encoder. Raises `NotComposable` for a model that has no use for one."""
        return self.open_library(self.backbone, self._encoder)

    def open_library(self, backbone: Backbone, encoder: Encoder) -> Library:
        """A new library in this place, of this model or of another."""
        place = self._place
        return Library(backbone, encoder, place.store, place.tenant, place.secret, self._kv_dtype)

    def of(self, encoder: Encoder) -> Collection:
        """The chunks that are encoded so."""
        with self._lock:
            if encoder not in self._opened:
                library = self.main if encoder == self._encoder else self.open_library(self.backbone, encoder)
                self._opened[encoder] = Collection(library)
                self._register(library)
            return self._opened[encoder]

    def prefix_cache(self, caching: PrefixCaching) -> PrefixCache:
        """What this way of prefix caching has kept."""
        with self._lock:
            if caching not in self._prefix_caches:
                self._prefix_caches[caching] = caching.open()
            return self._prefix_caches[caching]

    def __iter__(self) -> Iterator[Collection]:
        """Those that have been opened."""
        with self._lock:
            return iter(list(self._opened.values()))

    def libraries(self) -> list[Library]:
        """All that have been opened, the auxiliary model's last."""
        return [each.library for each in self] + ([] if self.auxiliary is None else [self.auxiliary])

    def name(self, text: str) -> str:
        """What a chunk is called in the index."""
        return self.main.key(text)

    def follow(self) -> list[str]:
        """Take note of what other processes stored and removed: what is new is recognised in prompts, and what is
        nowhere any more, which may have been forgotten, no longer is. Returns the texts of the latter.
        """
        gone: set[str] = set()
        for each in self:
            store = each.library.store
            store.refresh()
            gone.update(store.vanished())
            if store.changes != self._seen.get(each):
                self._seen[each] = store.changes
                each.variants.refresh()
                self._register(each.library)
        lost = self._lose(gone) if gone else []
        if lost:
            self.clear_prefix_caches()
        return lost

    def forget(self, texts: Iterable[str], unwanted: Container[str]) -> None:
        """Drop these chunks from all that are open, with whatever was computed behind one of the canonical texts
        ``unwanted``. Raises `StoreError` when some of it is still there, after having tried all.
        """
        self.clear_prefix_caches()
        failures = []
        for text in texts:
            name = self.name(text)
            self.index.remove(name)
            for each in self:
                each.drop(text, name)
        for library in self.libraries():
            try:
                library.forget(unwanted)
            except StoreError as error:
                failures.append(error)
        for each in self:
            each.variants.refresh()
        if failures:
            raise failures[0]

    def clear_prefix_caches(self) -> None:
        """Drop all that prefix caching has kept: it may hold any text."""
        with self._lock:
            self._prefix_caches.clear()

    def _lose(self, gone: Container[str]) -> list[str]:
        """Let go of the texts whose KV had these keys and is in none of the libraries any more."""
        opened = list(self)
        lost = []
        for text in self.index.texts():
            held = any(text in each.library for each in opened)
            if not held and any(each.library.key(text) in gone for each in opened):
                self.index.remove(self.name(text))
                for each in opened:
                    each.drop(text, self.name(text))
                lost.append(text)
        return lost

    def _register(self, library: Library) -> None:
        for entry in library.store.entries():
            self.index.add(self.name(entry.text), entry.text)
