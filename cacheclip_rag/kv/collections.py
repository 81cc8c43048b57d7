"""The ways of encoding that an engine has in use: for each a library of chunks, and what reuses them."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property

from ..errors import StoreError
from ..model.backbone import Backbone
from ..prefill.compose import Reuse
from ..prefill.harvest import Harvesting
from ..prompt import ChunkIndex
from ..store.place import Place
from .encode import Encoder, Harvested
from .library import KVDtype, Library


class Encodings:
    """Each opened when it is first asked for. Other encodings are other chunks: their KV is kept side by side.

    One ``index`` serves all of them, in which a chunk's name is its key in the `main` library.
    """

    def __init__(
        self, backbone: Backbone, encoder: Encoder, index: ChunkIndex, place: Place, kv_dtype: KVDtype = "auto"
    ) -> None:
        self._backbone, self._encoder, self._index = backbone, encoder, index
        self._place, self._kv_dtype = place, kv_dtype
        self._opened: dict[Encoder, Reuse] = {}
        self._seen: dict[Reuse, int] = {}
        self._lock = threading.Lock()

    @cached_property
    def main(self) -> Library:
        """The library of the engine's own encoder. Raises `NotComposable` for a model that has no use for one."""
        return self.library(self._backbone, self._encoder)

    def library(self, backbone: Backbone, encoder: Encoder) -> Library:
        """A new library in this place, of this model or of another."""
        place = self._place
        return Library(backbone, encoder, place.store, place.tenant, place.secret, self._kv_dtype)

    def reuse(self, encoder: Encoder) -> Reuse:
        """Reuse of chunks that are encoded so."""
        with self._lock:
            if encoder not in self._opened:
                library = self.main if encoder == self._encoder else self.library(self._backbone, encoder)
                self._opened[encoder] = (
                    Harvesting(library, self._index, encoder)
                    if isinstance(encoder, Harvested)
                    else Reuse(library, self._index)
                )
                self._know(library)
            return self._opened[encoder]

    def __iter__(self) -> Iterator[Reuse]:
        """Those that have been opened."""
        with self._lock:
            return iter(list(self._opened.values()))

    def follow(self) -> list[str]:
        """Take note of what other processes stored and removed: what is new is recognised in prompts, and what is
        nowhere any more, which may have been forgotten, no longer is. Returns the texts of the latter.
        """
        gone: set[str] = set()
        for reuse in self:
            store = reuse.library.store
            store.refresh()
            gone.update(store.vanished())
            if store.changes != self._seen.get(reuse):
                self._seen[reuse] = store.changes
                reuse.fused.refresh()
                self._know(reuse.library)
        return self._lost(gone) if gone else []

    def _lost(self, gone: Collection[str]) -> list[str]:
        """Let go of the texts whose KV had these keys and is in none of the libraries any more."""
        opened = list(self)
        lost = []
        for text in self._index.texts():
            held = any(text in reuse.library for reuse in opened)
            if not held and any(reuse.library.key(text) in gone for reuse in opened):
                name = self.main.key(text)
                self._index.remove(name)
                for reuse in opened:
                    reuse.forget(text, name)
                lost.append(text)
        return lost

    def forget(self, texts: Iterable[str], unwanted: Collection[str]) -> None:
        """Drop these chunks from all that are open, with whatever was computed behind one of the canonical
        texts ``unwanted``. Raises `StoreError` when some of it is still there, after having tried all.
        """
        for text in texts:
            name = self.main.key(text)
            self._index.remove(name)
            for reuse in self:
                reuse.forget(text, name)
        failures = []
        for reuse in self:
            try:
                reuse.library.forget(unwanted)
            except StoreError as error:
                failures.append(error)
            reuse.fused.refresh()
        if failures:
            raise failures[0]

    def _know(self, library: Library) -> None:
        for entry in library.store.entries():
            self._index.add(self.main.key(entry.text), entry.text)
