"""One request's KV cache: a buffer per layer that can be written at scattered rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..chunks import ChunkKV
from .attention import Sparse
from .rotary import Rotary


class Amend(Protocol):
    """Changes KV that a forward does not write, layer by layer, in the light of what it writes."""

    def __call__(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor, new: tuple[Tensor, Tensor]) -> None:
        """``rows [S]`` int64 are about to be written with ``new``, keys and values ``[Hk, S, D]``; ``keys``, ``values
        [Hk, capacity, D]`` are the layer's, still without them, to be changed in place.
        """


class Canvas(Cache):
    """KV of ``capacity`` slots for all layers, ``[L, 1, Hk, capacity, D]``.

    Chunk KV is *placed* on it (copied and rotated, so the store stays untouched), a forward over some rows *overwrites*
    those rows in every layer before they are attended to, and decoding appends. `length` is the number of slots in use;
    `aim` says which slots the next forward writes.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (layers, 1, kv_heads, capacity, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        # Layers do not know the canvas: in a circle its memory would outlive the request until the collector runs.
        self._slots = _Slots(capacity)
        super().__init__(
            layers=[
                _CanvasLayer(number, keys, values, self._slots)
                for number, (keys, values) in enumerate(zip(self.keys, self.values, strict=True))
            ]
        )

    @property
    def length(self) -> int:
        return self._slots.length

    @length.setter
    def length(self, length: int) -> None:
        self._slots.length = length

    @property
    def capacity(self) -> int:
        return self._slots.capacity

    @property
    def nbytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def aim(self, sparse: Sparse) -> None:
        """The next forward writes its K and V at these rows."""
        first, last = sparse.blocks[0].first, sparse.blocks[-1].last
        if last >= self.capacity:
            raise IndexError(f"row {last} does not fit on a canvas of {self.capacity} slots")
        # A run of rows is a slice: writing it costs a copy, not a scatter.
        run = last - first + 1 == len(sparse.rows)
        self._slots.aimed = slice(first, last + 1) if run else sparse.rows
        self.length = max(self.length, last + 1)

    @contextmanager
    def amended(self, amend: Amend) -> Iterator[None]:
        """Have ``amend`` called in every layer of the forwards inside, before the layer's rows are written."""
        self._slots.amend = amend
        try:
            yield
        finally:
            self._slots.amend = None

    def place(self, chunk: ChunkKV, tokens: slice, row: int, rotary: Rotary, position: int | None = None) -> None:
        """Copy the KV of ``chunk``'s ``tokens`` to the slots from ``row`` on, rotated to ``position`` (or to row)."""
        keys, values = chunk.keys[:, :, tokens], chunk.values[:, :, tokens]
        target = slice(row, row + keys.shape[2])
        delta = (row if position is None else position) - (chunk.position + tokens.start)
        rotary.rotate(keys.to(self.keys.device), delta, out=self.keys[:, 0, :, target])
        self.values[:, 0, :, target] = values
        self.length = max(self.length, target.stop)

    def write(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Copy exact KV ``[L, Hk, n, D]``, already at its position, to the slots from ``row`` on."""
        target = slice(row, row + keys.shape[2])
        self.keys[:, 0, :, target] = keys
        self.values[:, 0, :, target] = values
        self.length = max(self.length, target.stop)

    def read(self, rows: slice) -> tuple[Tensor, Tensor]:
        """A copy of the KV at ``rows``: keys and values ``[L, Hk, n, D]``."""
        return self.keys[:, 0, :, rows].clone(), self.values[:, 0, :, rows].clone()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


@dataclass
class _Slots:
    """What a canvas and its layers share: how many slots there are and in use, and which the next forward writes."""

    capacity: int
    length: int = 0
    aimed: slice | Tensor = field(default_factory=lambda: slice(0, 0))
    amend: Amend | None = None


class _CanvasLayer(CacheLayerMixin):
    """transformers' view of one layer of a `Canvas`: ``keys``, ``values [1, Hk, capacity, D]``."""

    is_sliding = False  # sliding windows are a matter of the mask here; the buffer keeps every row

    def __init__(self, number: int, keys: Tensor, values: Tensor, slots: _Slots) -> None:
        super().__init__()
        self._number = number
        self.keys: Tensor = keys
        self.values: Tensor = values
        self._slots = slots
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        aimed, length = self._slots.aimed, self._slots.length
        if self._slots.amend is not None:
            rows = torch.arange(aimed.start, aimed.stop, device=self.keys.device) if isinstance(aimed, slice) else aimed
            self._slots.amend(self._number, rows, self.keys[0], self.values[0], (key_states[0], value_states[0]))
        if isinstance(aimed, slice):
            self.keys[:, :, aimed] = key_states
            self.values[:, :, aimed] = value_states
        else:
            self.keys.index_copy_(2, aimed, key_states)
            self.values.index_copy_(2, aimed, value_states)
        return self.keys[:, :, :length], self.values[:, :, :length]

    def get_seq_length(self) -> int:
        return self._slots.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._slots.length, 0

    def get_max_length(self) -> int:
        return self._slots.capacity

    def get_max_cache_shape(self) -> int:  # the name before transformers 5.23
        return self._slots.capacity
