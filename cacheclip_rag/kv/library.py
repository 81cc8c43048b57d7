"""The chunk KV of one model and one encoder: looks it up in a store, and computes what is missing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..chunks import MIN_CHARS, ChunkKV, Namespace, canonical
from ..errors import CacheClipError, ConfigurationError, PromptError, StoreError
from ..interrupts import raised_by_signal
from ..model.backbone import Backbone
from ..store import ChunkStore, Int8Store, MemoryStore, TieredStore
from ..store.format import FORMAT
from .encode import Encoder, Text, soft_tokens

KVDtype = Literal["auto", "int8"]
"""The dtype chunk KV is stored in: the model's own, or 8 bits (see `store.int8`)."""


class Library:
    """The chunks of one `Namespace`: a backbone, an encoder, and the store that keeps the results.

    ``open_store(namespace)`` opens the store; the namespace depends on the model. ``tenant`` and ``secret`` separate
    its chunks from others (see `Namespace`). ``kv_dtype`` "int8" stores them in 8 bits: half the bytes, with a
    quantisation error. Chunks are returned in the model's dtype either way.
    """

    def __init__(
        self,
        backbone: Backbone,
        encoder: Encoder,
        open_store: Callable[[Namespace], ChunkStore],
        tenant: str = "",
        secret: bytes = b"",
        kv_dtype: KVDtype = "auto",
    ) -> None:
        self.backbone, self.encoder = backbone, encoder
        self._state = backbone.state()
        self.prefix_ids: Tensor = encoder.prefix_ids(backbone)
        self.soft = soft_tokens(encoder, backbone)
        self.namespace = Namespace(
            {
                "format": FORMAT,
                **backbone.fingerprint(),
                "prefix": self.prefix_ids.tolist(),
                "encoder": repr(encoder),
                **({"soft": [len(self.soft.before), len(self.soft.behind)]} if len(self.soft) else {}),
                "tenant": tenant,
                **({} if kv_dtype == "auto" else {"kv_dtype": kv_dtype}),
            },
            secret,
        )
        self.lossless = kv_dtype == "auto"
        store = open_store(self.namespace)
        self._lasting = store.tiers[-1] if isinstance(store, TieredStore) else store
        self.store: ChunkStore = store if self.lossless else Int8Store(store)
        self._prefix_kv: tuple[Tensor, Tensor] | None = None
        self._lock = threading.Lock()

    def changed(self) -> str | None:
        """Why the model computes other KV now than when this was opened, or None."""
        if self.backbone.state() == self._state:
            return None
        return (
            "the model's weights, mode, hooks or adapters were changed after the engine was opened: put it back, or "
            "open another engine for the model as it is now"
        )

    def key(self, text: str, context: Sequence[str] = (), in_sequence: bool = False) -> str:
        """The key of a chunk's KV, computed in this context (see `Namespace.key`)."""
        return self.namespace.key(text, context, in_sequence)

    def keeps(self, key: str) -> bool:
        """Whether the chunk is stored where a later process finds it. A chunk that a full disk refused is in memory
        only.
        """
        return key in self._lasting

    @property
    def shared(self) -> bool:
        """Whether other processes can change the store."""
        return not isinstance(self._lasting, MemoryStore)

    def __contains__(self, text: str) -> bool:
        return self.key(text) in self.store

    @property
    def prefix_kv(self) -> tuple[Tensor, Tensor] | None:
        """KV of the encode prefix, ``[L, Hk, P, D]`` from position 0 on; None for an empty prefix."""
        if self._prefix_kv is None and len(self.prefix_ids):
            with self._lock:
                canvas = self.backbone.canvas(len(self.prefix_ids))
                self.backbone.forward(self.prefix_ids, torch.arange(len(self.prefix_ids)), canvas, logits=0)
                self._prefix_kv = canvas.read(slice(None))
        return self._prefix_kv

    def encode(self, text: str) -> ChunkKV:
        """Compute the chunk's KV in isolation, behind the encode prefix. It is not stored.

        Raises `PromptError` for a text shorter than `MIN_CHARS`, longer than the context length, or not valid Unicode.
        """
        [made] = self.encode_each([text])
        if isinstance(made, Exception):
            raise made
        return made

    def encode_each(self, texts: Sequence[str]) -> list[ChunkKV | Exception]:
        """`encode` each of the texts, in one forward; where it would raise, the exception is in the chunk's place.

        If the forward fails, for example for lack of memory, they are encoded one by one.
        """
        checked: list[Text | Exception] = []
        for text in texts:
            try:
                checked.append(self._tokenised(text))
            except PromptError as error:
                checked.append(error)
        if (changed := self.changed()) is not None:
            return [ConfigurationError(changed)] * len(texts)
        good = [text for text in checked if not isinstance(text, Exception)]
        made: dict[str, ChunkKV | Exception] = {}
        try:
            if good:
                chunks = self.encoder.encode(self.backbone, good, [self.prefix_kv] * len(good))
                made = {text: chunk for (text, _), chunk in zip(good, chunks, strict=True)}
        except (CacheClipError, RuntimeError, MemoryError) as error:
            if raised_by_signal(error):
                raise
            if len(texts) == 1:
                return [error]
            return [self.encode_each([text])[0] for text in texts]
        return [text if isinstance(text, Exception) else made[text[0]] for text in checked]

    def _tokenised(self, text: str) -> Text:
        text = canonical(text)
        if len(text) < MIN_CHARS:
            raise PromptError(
                f"a chunk of {len(text)} characters is not kept: under {MIN_CHARS}, prefilling is as quick"
            )
        tokens = self.backbone.tokenise(text, plain=True)
        longest = self.backbone.context_length - len(self.prefix_ids) - len(self.soft)
        if len(tokens) > longest:
            raise PromptError(f"a chunk of {len(tokens)} tokens exceeds the model's limit of {longest}; split it")
        return text, tokens

    @property
    def _tiers(self) -> TieredStore | None:
        """The store's tiers; None where it is in memory only."""
        store = self.store.inner if isinstance(self.store, Int8Store) else self.store
        return store if isinstance(store, TieredStore) else None

    def at_hand(self, key: str) -> bool:
        """Whether nothing is to be waited for to get this chunk."""
        return (tiers := self._tiers) is None or key in tiers.tiers[0]

    def get(self, key: str, tokens: int | None = None) -> ChunkKV | None:
        """The stored chunk, or None if there is none, it is damaged, or its shape is not this model's.

        ``tokens``: how many of its tokens a prompt takes from it. Raises `NotWorthLoading` where computing these is
        quicker than loading it.
        """
        if tokens is not None and (tiers := self._tiers) is not None:
            tiers.weigh(key, tokens)
        chunk = self.store.get(key)
        if chunk is None:
            return None
        expected = (self.backbone.layers, self.backbone.kv_heads, len(chunk), self.backbone.head_dim)
        return chunk if tuple(chunk.keys.shape) == expected and chunk.keys.dtype == self.backbone.dtype else None

    def forget(self, unwanted: Collection[str]) -> None:
        """Delete every entry whose own (canonical) text is in ``unwanted``, or that has such a text in its context.

        Raises `StoreError` if some of them are still there.
        """
        gone = [
            entry.key
            for entry in self.store.entries()
            if any(canonical(text) in unwanted for text in (entry.text, *entry.context))
        ]
        self.store.delete(gone)
        if left := sum(map(self.keeps, gone)):
            raise StoreError(
                f"{left} of {len(gone)} entries could not be removed from the chunk store: make its folder writable "
                "and forget them again"
            )

    def ensure(self, text: str) -> ChunkKV:
        """The chunk, encoded and stored if need be. Raises what `encode` raises; a full store is not an error."""
        key = self.key(text)
        if (kept := self.get(key)) is not None:
            return kept
        [made] = self.ensure_each([text])
        if isinstance(made, Exception):
            raise made
        return made if self.lossless else self.get(key) or made  # rounded as later requests will read it

    def ensure_each(self, texts: Sequence[str]) -> list[ChunkKV | Exception]:
        """Encode and store these texts in one forward: each chunk as computed, or the exception why there is none."""
        made = self.encode_each(texts) if texts else []
        for text, chunk in zip(texts, made, strict=True):
            if isinstance(chunk, ChunkKV):
                self.store.put(self.key(text), chunk)
        return made
