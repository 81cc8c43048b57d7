"""The ways of encoding that an engine has in use: for each a library of chunks, and what reuses them."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property

from .backbone import Backbone
from .encode import Encoder, Harvested
from .harvesting import Harvesting
from .library import KVDtype, Library
from .prefill import Reuse
from .prompt import ChunkIndex
from .store.place import Place


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

    def follow(self) -> None:
        """Take note of what other processes stored and removed; what is new is recognised in prompts."""
        for reuse in self:
            if reuse.library.store.refresh():
                reuse.fused.refresh()
                self._know(reuse.library)

    def forget(self, texts: Iterable[str], unwanted: Collection[str]) -> None:
        """Drop these chunks from all that are open, with whatever was computed in the company of one of the canonical
        texts ``unwanted``.
        """
        for text in texts:
            name = self.main.key(text)
            self._index.remove(name)
            for reuse in self:
                reuse.forget(text, name)
        for reuse in self:
            reuse.library.forget(unwanted)
            reuse.fused.refresh()

    def _know(self, library: Library) -> None:
        for entry in library.store.entries():
            self._index.add(self.main.key(entry.text), entry.text)
