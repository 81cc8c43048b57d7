"""What one forward tells the attention function: which keys a row may see, who looks on, who weighs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...errors import ConfigurationError


class Enough(Exception):
    """Raised by a probe that has seen what it came for: the forward ends there, without logits."""


class Probe(Protocol):
    """Looks on while a forward runs; must not change anything, but may end it by raising `Enough`."""

    layers: frozenset[int]

    def __call__(self, layer: int, query: Tensor, key: Tensor, rows: Tensor, scaling: float) -> None:
        """``query [1, H, S, D]`` (rotated), ``key [1, Hk, N, D]`` (rotated, all slots), ``rows [S]`` int64."""


class Shape(Protocol):
    """How rows weigh the slots they see. ``first``: the layer from which on it holds; below it attention is plain."""

    first: int

    def survey(self, blocks: Iterator[tuple[Tensor, Tensor]]) -> Any:
        """Called once a layer and forward, before any `weigh`, with its ``(logits, rows)`` block by block.

        What it returns is handed to `weigh`.
        """

    def weigh(self, logits: Tensor, rows: Tensor, plan: Any) -> Tensor:
        """Probabilities ``[Hk, G, R, N]`` float32 from ``logits`` of that shape, -inf where a row may not look.

        ``rows [R]`` int64 are the slots of the queries.
        """


BLOCK = 128
"""Rows that are attended to together: few keys beyond a row's own slot are computed in vain."""

_KEEP = 1 << 27
"""Masks of at most this many elements are kept for the layers of a forward, others made anew by each."""


class Block(NamedTuple):
    """Rows ``[start, stop)``, the slots of the first and the last of them, and the first slot that they may see.

    Plain numbers, so that no layer waits for the device to tell.
    """

    start: int
    stop: int
    first: int
    last: int
    floor: int


class Sparse:
    """What one forward tells the attention function.

    ``rows [S]`` int64, strictly increasing: the canvas slots of the queries. A slot orders keys and defines causality;
    the RoPE position travels separately, as ``position_ids``. ``floors [S]`` int64, never decreasing, keep texts that
    share a canvas apart: a row sees nothing below its floor. Probes and shapes look at one text only.
    """

    def __init__(
        self,
        rows: Tensor,
        device: torch.device | str,
        probe: Probe | None = None,
        shape: Shape | None = None,
        floors: Tensor | None = None,
    ) -> None:
        if floors is not None and (probe is not None or shape is not None):
            raise ValueError("floors go with neither a probe nor a shape")
        slots = rows.tolist()
        self.rows, self.probe, self.shape = rows.to(device), probe, shape
        self.floors = None if floors is None else floors.to(device)
        self.blocks = list(_blocks(slots, [0] * len(slots) if floors is None else floors.tolist()))
        self.dense = floors is None and slots[0] == 0 and slots[-1] == len(slots) - 1
        """Whether the rows are all slots from 0 on: then the mask is an ordinary triangle."""
        self._biases: dict[tuple[int, int, int, int | None], Tensor] = {}

    def observe(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Show the probe, if there is one for this layer, what the layer attends with."""
        if self.probe is not None and layer in self.probe.layers:
            self.probe(layer, query, key, self.rows, scaling)

    def shape_of(self, layer: int) -> Shape | None:
        """How this layer's rows weigh what they see, or None for plain attention."""
        return self.shape if self.shape is not None and layer >= self.shape.first else None

    def bias(self, start: int, stop: int, keys: slice, groups: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of rows ``[start, stop)`` over the slots ``keys``: 0 or -inf.

        ``[groups * rows, keys]``, the rows once for each of ``groups`` query heads. Layers of one forward share it. It
        is additive because the CPU's fused kernel turns a boolean mask into this at every call, which takes nearly as
        long as the attention.
        """
        name = (start, keys.start, groups, window)
        if name not in self._biases:
            seen = visible(self.rows[start:stop] - keys.start, keys.stop - keys.start, window)
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
            bias = bias.repeat(groups, 1)
            if groups * len(self.rows) * keys.stop > _KEEP:
                return bias
            self._biases[name] = bias
        return self._biases[name]


def _blocks(slots: list[int], floors: list[int]) -> Iterator[Block]:
    """At most `BLOCK` rows each, all of one floor."""
    start = 0
    while start < len(slots):
        stop = min(start + BLOCK, bisect_right(floors, floors[start]))
        yield Block(start, stop, slots[start], slots[stop - 1], floors[start])
        start = stop


def trailing(queries: int, keys: int, device: torch.device, texts: int = 1) -> Sparse:
    """The newest slots as rows, for a forward that says nothing: any ordinary decoding step.

    Raises `ConfigurationError` for a batch of several ``texts``, whose padding nothing here knows of.
    """
    if texts != 1:
        raise ConfigurationError(
            f"this model was given to cacheclip_rag.Backbone, whose attention takes one text at a time, not {texts}: "
            "load another model for batches"
        )
    return Sparse(torch.arange(keys - queries, keys), device)


def visible(rows: Tensor, keys: int, window: int | None = None, floors: Tensor | None = None) -> Tensor:
    """The exact causal mask of scattered rows, ``[S, N]`` bool, true where a row may look.

    ``rows [S]`` int64 slots; ``keys`` = N; ``window`` = a sliding window's width in tokens, as transformers counts it
    (a token sees itself and the ``window - 1`` tokens before it); ``floors [S]`` int64, the first slot each may see.

    This is *not* a bottom-right aligned triangle: aligning scattered rows to the end of the keys lets early rows see
    the future, which is a known fault of two public implementations of selective recompute.
    """
    slots = torch.arange(keys, device=rows.device)
    mask = slots <= rows[:, None]
    if window is not None:
        mask &= slots > rows[:, None] - window
    if floors is not None:
        mask &= slots >= floors[:, None]
    return mask
