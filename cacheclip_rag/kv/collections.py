"""The stored chunks of an engine, by encoding."""

from __future__ import annotations

import threading
from collections.abc import Collection as Container
from collections.abc import Iterable, Iterator
from functools import cached_property, partial

from ..errors import ConfigurationError, NotComposable, StoreError
from ..model.adapter import with_adapter
from ..model.backbone import Backbone
from ..prompt import ChunkIndex
from ..prompt.soft import SoftKind
from ..store import LoadingCost, MemoryBudget
from ..store.place import Place
from .encode import Encoder, Harvested, HarvestedVariants
from .library import KVDtype, Library
from .preamble import PreambleCache
from .prefix_caching import PrefixCache, PrefixCaching
from .variants import FusedVariants


class Collection:
    """The chunks of one encoding.

    ``library``: their KV computed in isolation; ``variants``: fused variants, computed behind other chunks;
    ``harvested``: variants taken from finished prompts, for an encoder that harvests; ``preambles``: KV of the
    preambles of prompts with these chunks.
    """

    def __init__(self, library: Library, memory: MemoryBudget) -> None:
        self.library = library
        self.variants = FusedVariants(library)
        encoder = library.encoder
        self.harvested = HarvestedVariants(encoder, memory) if isinstance(encoder, Harvested) else None
        self.preambles = PreambleCache(memory)

    def drop(self, text: str, name: str) -> None:
        """Delete a chunk's KV; ``name`` is its key in the index. Fused variants are left to `Library.forget`."""
        self.library.store.delete([self.library.key(text)])
        self.preambles.clear()  # a chunk without KV may have been prefilled as part of a preamble
        if self.harvested is not None:
            self.harvested.forget(name)


class Collections:
    """One `Collection` per encoding, opened on first use.

    They share one ``index``, in which a chunk's name is its key in the `main` library. ``auxiliary`` is the library of
    the auxiliary model, whose chunks are stored and forgotten with the others.
    """

    def __init__(
        self, backbone: Backbone, encoder: Encoder, index: ChunkIndex, place: Place, kv_dtype: KVDtype = "auto"
    ) -> None:
        self.backbone, self.index = backbone, index
        self.auxiliary: Library | None = None
        self._encoder, self._place, self._kv_dtype = encoder, place, kv_dtype
        self._opened: dict[Encoder, Collection] = {}
        self._adapted: dict[tuple[str, SoftKind | None], Backbone] = {}
        self._seen: dict[Collection, int] = {}
        self._prefix_caches: dict[PrefixCaching, PrefixCache] = {}
        self._lock, self._loading = threading.Lock(), threading.Lock()

    @cached_property
    def main(self) -> Library:
        """The library of the engine's own encoder. Raises `NotComposable` for a model whose KV cannot be moved."""
        return self.open_library(self.backbone_of(self._encoder), self._encoder)

    def backbone_of(self, encoder: Encoder) -> Backbone:
        """The model that encodes these chunks and answers from them: the engine's own, with the encoder's adapter
        merged if it names one. An adapter is loaded once.

        Raises `ConfigurationError` for a folder that holds no adapter of this model, and for an encoder that cannot do
        without one; `NotComposable` for a model that takes none.
        """
        adapter: str | None = getattr(encoder, "adapter", None)
        soft: SoftKind | None = getattr(encoder, "trained", None)
        if adapter is None:
            if soft is not None:
                raise ConfigurationError(
                    f"this method needs soft tokens that were trained for the model: cacheclip tune {soft} DATA "
                    "--model NAME --out FOLDER, then adapter=FOLDER"
                )
            return self.backbone
        if self.backbone.obstacle is not None:
            raise NotComposable(f"an adapter is for composed prompts only, and {self.backbone.obstacle}")
        with self._loading:
            if (adapter, soft) not in self._adapted:
                self._adapted[adapter, soft] = with_adapter(self.backbone, adapter, soft)
            return self._adapted[adapter, soft]

    @property
    def cost(self) -> LoadingCost:
        """What loading chunks and computing tokens take here."""
        return self._place.cost

    def open_library(self, backbone: Backbone, encoder: Encoder) -> Library:
        """A new library in this place, for any model and encoder."""
        place = self._place
        return Library(backbone, encoder, place.store, place.tenant, place.secret, self._kv_dtype)

    def of(self, encoder: Encoder) -> Collection:
        """The collection of this encoder, opened if need be."""
        with self._lock:
            if encoder not in self._opened:
                model = self.backbone_of(encoder)
                library = self.main if encoder == self._encoder else self.open_library(model, encoder)
                self._opened[encoder] = Collection(library, self._place.memory)
                self._register(library)
            return self._opened[encoder]

    def prefix_cache(self, caching: PrefixCaching) -> PrefixCache:
        """The prefix cache of this kind, opened if need be."""
        with self._lock:
            if caching not in self._prefix_caches:
                self._prefix_caches[caching] = caching.open(self._place.memory)
            return self._prefix_caches[caching]

    def __iter__(self) -> Iterator[Collection]:
        """The collections opened so far."""
        with self._lock:
            return iter(list(self._opened.values()))

    def memory_by_kind(self) -> dict[str, int]:
        """Bytes of KV in memory by kind; together they are within the place's budget."""
        return self._place.memory.by_kind()

    def libraries(self) -> list[Library]:
        """The libraries opened so far, the auxiliary model's last."""
        return [each.library for each in self] + ([] if self.auxiliary is None else [self.auxiliary])

    def name(self, text: str) -> str:
        """A chunk's name in the index."""
        return self.main.key(text)

    def follow(self) -> list[str]:
        """Catch up with what other processes stored and removed.

        New chunks are recognised in prompts from now on. Chunks that are in no library any more may have been
        forgotten, so they are dropped; returns their texts.
        """
        gone: set[str] = set()
        forgotten = self._place.refresh()  # all open stores, the auxiliary model's included
        for each in self:
            store = each.library.store
            gone.update(store.vanished())
            if store.changes != self._seen.get(each):
                self._seen[each] = store.changes
                each.variants.refresh()
                self._register(each.library)
        lost = self._lose(gone, forgotten) if gone or forgotten else []
        if lost:
            self.clear_prefix_caches()
        return lost

    def forget(self, texts: Iterable[str], unwanted: Container[str]) -> None:
        """Delete these chunks from all open collections, with all KV that has one of the canonical texts ``unwanted``
        in its context. Tries everything, then raises `StoreError` if some of it is still there.
        """
        self.clear_prefix_caches()
        failures = []
        for text in texts:
            self.index.remove(self.name(text))
        drops = [partial(each.drop, text, self.name(text)) for text in texts for each in self]
        for forget in drops + [partial(library.forget, unwanted) for library in self.libraries()]:
            try:
                forget()
            except StoreError as error:
                failures.append(error)
        for each in self:
            each.variants.refresh()
        if failures:
            raise failures[0]

    def clear_prefix_caches(self) -> None:
        """Empty all prefix caches: they may contain any text."""
        with self._lock:
            for cache in self._prefix_caches.values():
                cache.clear()

    def _lose(self, gone: Container[str], forgotten: bool) -> list[str]:
        """Drop the texts whose KV had one of these keys and is in no library any more, or, if another process has
        ``forgotten`` anything, whose KV is in no library. Returns them.
        """
        opened = list(self)
        lost = []
        for text in self.index.texts():
            held = any(text in each.library for each in opened)
            if not held and (forgotten or any(each.library.key(text) in gone for each in opened)):
                self.index.remove(self.name(text))
                for each in opened:
                    each.drop(text, self.name(text))
                lost.append(text)
        return lost

    def _register(self, library: Library) -> None:
        for entry in library.store.entries():
            self.index.add(self.name(entry.text), entry.text)
