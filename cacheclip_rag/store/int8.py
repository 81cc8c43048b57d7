"""Chunk KV quantised to 8 bits: about half of bfloat16's bytes, with rounding errors.

Keys are quantised per channel, since a few channels of every head are large for all tokens; values per token, since no
channel of theirs is. The first tokens stay as they are: the attention sink is among them where a chunk is encoded bare,
and its numbers are far from all others. Source: KIVI (arXiv 2402.02750), with 8 bits instead of 2.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from ..chunks import ChunkKV
from .base import ChunkStore, Entry, StoreStats

FIRST = 4
"""Tokens at a chunk's beginning that are kept in full precision."""

_STEPS = 127
_NAMES = {"key_scales", "key_centres", "value_scales", "first_keys", "first_values"}


class Int8Store:
    """A `ChunkStore` over another one that holds everything in 8 bits: what is put is packed, what is got unpacked.

    A chunk whose KV is not finite is not kept.
    """

    def __init__(self, inner: ChunkStore) -> None:
        self.inner = inner

    def get(self, key: str) -> ChunkKV | None:
        chunk = self.inner.get(key)
        return None if chunk is None or not chunk.packing else unpack(chunk)

    def put(self, key: str, chunk: ChunkKV) -> bool:
        try:
            return self.inner.put(key, pack(chunk))
        except ValueError:
            return False

    def put_spare(self, key: str, chunk: ChunkKV) -> bool:
        try:
            return self.inner.put_spare(key, pack(chunk))
        except ValueError:
            return False

    def spare_bytes(self) -> int:
        return self.inner.spare_bytes()

    def delete(self, keys: Collection[str]) -> None:
        self.inner.delete(keys)

    def entries(self) -> Iterator[Entry]:
        return self.inner.entries()

    def refresh(self) -> bool:
        return self.inner.refresh()

    @property
    def changes(self) -> int:
        return self.inner.changes

    def vanished(self) -> list[str]:
        return self.inner.vanished()

    def forgettings(self) -> bytes:
        return self.inner.forgettings()

    def holding(self, keys: Collection[str] = ()) -> AbstractContextManager[None]:
        return self.inner.holding(keys)

    def room(self) -> int | None:
        return self.inner.room()

    def fitting(self, texts: Sequence[str]) -> int:
        return self.inner.fitting(texts)

    def stats(self) -> StoreStats:
        return self.inner.stats()

    def __contains__(self, key: object) -> bool:
        return key in self.inner


def pack(chunk: ChunkKV) -> ChunkKV:
    """The chunk with ``keys`` and ``values [L, Hk, n, D]`` in int8, and in ``packing`` what `unpack` needs.

    ``key_scales``, ``key_centres [L, Hk, 1, D]`` and ``value_scales [L, Hk, n, 1]`` float32; ``first_keys``,
    ``first_values [L, Hk, min(FIRST, n), D]`` as they were. A number comes back within half a scale of what it was,
    before it is rounded to its own dtype. Raises ValueError for KV that is not finite.
    """
    keys, values = chunk.keys.float(), chunk.values.float()
    if not (keys.isfinite().all() and values.isfinite().all()):
        raise ValueError("KV that is not finite cannot be quantised")
    later = keys[:, :, FIRST:] if len(chunk) > FIRST else keys
    # Channels lie around a mean of their own, a bias far from 0 in some models, so what is quantised is the rest.
    low, high = later.amin(dim=2, keepdim=True), later.amax(dim=2, keepdim=True)
    centres = low / 2 + high / 2
    key_scales = _scales(high / 2 - low / 2)
    value_scales = _scales(values.abs().amax(dim=3, keepdim=True))
    packing = {
        "key_scales": key_scales,
        "key_centres": centres,
        "value_scales": value_scales,
        "first_keys": chunk.keys[:, :, :FIRST].clone(),
        "first_values": chunk.values[:, :, :FIRST].clone(),
    }
    return replace(chunk, keys=_codes(keys - centres, key_scales), values=_codes(values, value_scales), packing=packing)


def unpack(chunk: ChunkKV) -> ChunkKV:
    """The chunk with KV of the dtype it had before `pack`."""
    packing = chunk.packing
    keys = chunk.keys * packing["key_scales"] + packing["key_centres"]
    values = chunk.values * packing["value_scales"]
    dtype = packing["first_keys"].dtype
    keys, values = keys.to(dtype), values.to(dtype)
    keys[:, :, :FIRST] = packing["first_keys"]
    values[:, :, :FIRST] = packing["first_values"]
    return replace(chunk, keys=keys, values=values, packing={})


def well_formed(keys: Tensor, packing: Mapping[str, Tensor]) -> bool:
    """Whether ``packing`` is what `pack` makes beside ``keys [L, Hk, n, D]``: names, shapes, dtypes, finite scales."""
    if set(packing) != _NAMES or keys.dtype != torch.int8:
        return False
    layers, heads, count, width = keys.shape
    shapes = {
        "key_scales": (layers, heads, 1, width),
        "key_centres": (layers, heads, 1, width),
        "value_scales": (layers, heads, count, 1),
        "first_keys": (layers, heads, min(FIRST, count), width),
        "first_values": (layers, heads, min(FIRST, count), width),
    }
    whole = packing["first_keys"].is_floating_point() and packing["first_keys"].dtype == packing["first_values"].dtype
    return (
        whole
        and all(packing[name].shape == shape for name, shape in shapes.items())
        and all(packing[name].dtype == torch.float32 for name in ("key_scales", "key_centres", "value_scales"))
        and all(bool((packing[name] > 0).all()) for name in ("key_scales", "value_scales"))
        and all(bool(tensor.isfinite().all()) for tensor in packing.values())
    )


def _scales(reach: Tensor) -> Tensor:
    """The width of a step, so that ``reach`` is `_STEPS` of them; above 0 where all numbers are the same."""
    return (reach / _STEPS).clamp_min(torch.finfo(torch.float32).tiny)


def _codes(numbers: Tensor, scales: Tensor) -> Tensor:
    return (numbers / scales).round().clamp(-_STEPS, _STEPS).to(torch.int8)
