"""Which keys a row may see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Probe(Protocol):
    """Looks on while a forward runs; must not change anything."""

    layers: frozenset[int]

    def __call__(self, layer: int, query: Tensor, key: Tensor, rows: Tensor, scaling: float) -> None:
        """``query [1, H, S, D]`` (rotated), ``key [1, Hk, N, D]`` (rotated, all slots), ``rows [S]`` int64."""


@dataclass(frozen=True, eq=False)
class Sparse:
    """What one forward tells the attention function.

    ``rows [S]`` int64, strictly increasing: the canvas slots of the queries. A slot orders keys and defines
    causality; the RoPE position travels separately, as ``position_ids``.
    """

    rows: Tensor
    probe: Probe | None = None

    def observe(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Show the probe, if there is one for this layer, what the layer attends with."""
        if self.probe is not None and layer in self.probe.layers:
            self.probe(layer, query, key, self.rows, scaling)


def trailing(queries: int, keys: int, device: torch.device) -> Tensor:
    """Rows ``[S]`` of a forward that carries no `Sparse`: the newest slots, as in any ordinary decoding step."""
    return torch.arange(keys - queries, keys, device=device)


def visible(rows: Tensor, keys: int, window: int | None = None) -> Tensor:
    """The exact causal mask of scattered rows, ``[S, N]`` bool, true where a row may look.

    ``rows [S]`` int64 slots; ``keys`` = N; ``window`` = a sliding window's width in tokens, as transformers counts it
    (a token sees itself and the ``window - 1`` tokens before it).

    This is *not* a bottom-right aligned triangle: aligning scattered rows to the end of the keys lets early rows see
    the future, which is a known fault of two public implementations of selective recompute.
    """
    slots = torch.arange(keys, device=rows.device)
    mask = slots <= rows[:, None]
    if window is not None:
        mask &= slots > rows[:, None] - window
    return mask
