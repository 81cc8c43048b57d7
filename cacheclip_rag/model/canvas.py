"""The KV cache of one request: preallocated buffers per layer that can be written at scattered rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..chunks import ChunkKV
from ..compute import to_device
from .attention import SparseRows
from .rotary import Rotary


class Canvas(Cache):
    """The KV cache of one request, ``[L, 1, Hk, capacity, D]``: the `Workspace` of a model of transformers.

    Chunk KV is *placed* on it (copied and rotated; the store is not changed). A forward over some rows *overwrites* the
    KV of those rows in every layer, before they attend. Decoding appends. `length` is the number of slots in use;
    `set_write_rows` says which slots the next forward writes.
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
        rotary: Rotary | None = None,
    ) -> None:
        shape = (layers, 1, kv_heads, capacity, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        # Layers hold no reference to the canvas: a cycle would keep its memory until the garbage collector runs.
        self._slots = _Slots(capacity)
        self._rotary = rotary
        super().__init__(
            layers=[
                CanvasLayer(number, keys, values, self._slots)
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

    def set_write_rows(self, sparse: SparseRows) -> None:
        """Set the slots that the next forward writes its KV to. Raises IndexError beyond the capacity."""
        first, last = sparse.blocks[0].first, sparse.blocks[-1].last
        if last >= self.capacity:
            raise IndexError(f"row {last} does not fit on a canvas of {self.capacity} slots")
        # Contiguous rows are a slice, so that writing them is a copy and not a scatter.
        run = last - first + 1 == len(sparse.rows)
        self._slots.rows = slice(first, last + 1) if run else sparse.rows
        self._slots.held_back, self._slots.pending = sparse.hooked, {}
        self.length = max(self.length, last + 1)

    def pending(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The new keys and values ``[1, Hk, S, D]`` of a layer, buffered until its hooks have run; None without any."""
        return self._slots.pending.get(layer)

    def write_pending(self, layer: int) -> None:
        """Write the buffered KV of a layer to its slots."""
        keys, values = self._slots.pending.pop(layer)
        rows = self._slots.rows
        for buffer, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if isinstance(rows, slice):
                buffer[:, :, rows] = new
            else:
                buffer.index_copy_(2, rows, new)

    def place(self, chunk: ChunkKV, tokens: slice, row: int, position: int | None = None) -> None:
        """Copy the KV of ``chunk``'s ``tokens`` to the slots from ``row`` on, rotated to ``position`` (or to row)."""
        assert self._rotary is not None, "a canvas without a rotation takes no chunks"
        keys, values = chunk.keys[:, :, tokens], chunk.values[:, :, tokens]
        target = slice(row, row + keys.shape[2])
        delta = (row if position is None else position) - (chunk.position + tokens.start)
        self._rotary.rotate(to_device(keys, self.keys.device), delta, out=self.keys[:, 0, :, target])
        self.values[:, 0, :, target] = to_device(values, self.keys.device)
        self.length = max(self.length, target.stop)

    def write(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Copy KV ``[L, Hk, n, D]`` of all layers, already at its position, to the slots from ``row`` on."""
        target = slice(row, row + keys.shape[2])
        self.keys[:, 0, :, target] = keys
        self.values[:, 0, :, target] = values
        self.length = max(self.length, target.stop)

    def write_layer(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Copy KV ``[n, Hk, D]`` of one layer to the slots ``rows [n]``."""
        self.keys[layer, 0].index_copy_(1, rows, keys.transpose(0, 1))
        self.values[layer, 0].index_copy_(1, rows, values.transpose(0, 1))

    def placed(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of one layer's keys and values, ``[capacity, Hk, D]``."""
        return self.keys[layer, 0].transpose(0, 1), self.values[layer, 0].transpose(0, 1)

    def read(self, rows: slice) -> tuple[Tensor, Tensor]:
        """A copy of the KV at ``rows``: keys and values ``[L, Hk, n, D]``."""
        return self.keys[:, 0, :, rows].clone(), self.values[:, 0, :, rows].clone()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


@dataclass
class _Slots:
    """State that a canvas shares with its layers: the slots in use, and those that the next forward writes.

    ``held_back``: whether new KV is buffered in ``pending``, by layer, until hooks have run.
    """

    capacity: int
    length: int = 0
    rows: slice | Tensor = field(default_factory=lambda: slice(0, 0))
    held_back: bool = False
    pending: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class CanvasLayer(CacheLayerMixin):
    """One layer of a `Canvas` as a cache layer of transformers: ``keys``, ``values [1, Hk, capacity, D]``."""

    is_sliding = False  # sliding windows are applied by the mask; the buffer keeps every row

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
        rows, length = self._slots.rows, self._slots.length
        if self._slots.held_back:
            self._slots.pending[self._number] = key_states, value_states
        elif isinstance(rows, slice):
            self.keys[:, :, rows] = key_states
            self.values[:, :, rows] = value_states
        else:
            self.keys.index_copy_(2, rows, key_states)
            self.values.index_copy_(2, rows, value_states)
        return self.keys[:, :, :length], self.values[:, :, :length]

    def get_seq_length(self) -> int:
        return self._slots.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._slots.length, 0

    def get_max_length(self) -> int:
        return self._slots.capacity

    def get_max_cache_shape(self) -> int:  # the name before transformers 5.23
        return self._slots.capacity
