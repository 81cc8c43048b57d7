"""What one forward tells the attention function: which keys a row may see, which hooks look on, which scores change."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...compute import Hook, LayerInput, ScoreMod, Workspace, visible
from ...errors import ConfigurationError

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


class HoldsBack(Workspace, Protocol):
    """A workspace that keeps a layer's new KV back until hooks have seen it."""

    def pending(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The new keys and values ``[1, Hk, S, D]``; None where the layer keeps none."""

    def write_pending(self, layer: int) -> None:
        """Write them."""


class SparseRows:
    """What one forward tells the attention function.

    ``rows [S]`` int64, strictly increasing: the canvas slots of the queries. A slot orders keys and defines causality;
    the RoPE position travels separately, as ``position_ids``. ``floors [S]`` int64, never decreasing, keep texts that
    share a canvas apart: a row sees nothing below its floor. Hooks and score modifications take one text only.
    ``canvas`` is where hooks see the KV that is placed, and where a layer's new KV waits for them.
    """

    def __init__(
        self,
        rows: Tensor,
        device: torch.device | str,
        canvas: HoldsBack | None = None,
        hooks: Sequence[Hook] = (),
        score_mod: ScoreMod | None = None,
        floors: Tensor | None = None,
    ) -> None:
        if floors is not None and (hooks or score_mod is not None):
            raise ValueError("floors go with neither hooks nor a score modification")
        slots = rows.tolist()
        self.rows, self.score_mod = rows.to(device), score_mod
        self.floors = None if floors is None else floors.to(device)
        self.blocks = list(_blocks(slots, [0] * len(slots) if floors is None else floors.tolist()))
        self.dense = floors is None and slots[0] == 0 and slots[-1] == len(slots) - 1
        """Whether the rows are all slots from 0 on: then the mask is an ordinary triangle."""
        self._canvas, self._hooks = canvas, tuple(hooks)
        self._biases: dict[tuple[int, int, int, int | None], Tensor] = {}

    @property
    def hooked(self) -> bool:
        """Whether layers keep their new KV back until `before_attention` has shown it to hooks."""
        return bool(self._hooks)

    def before_attention(self, layer: int, query: Tensor, scaling: float) -> None:
        """Show hooks what the layer attends with, ``query [1, H, S, D]``, then write its KV."""
        if not self._hooks or self._canvas is None or (new := self._canvas.pending(layer)) is None:
            return
        key, value = (one[0].transpose(0, 1) for one in new)
        at = LayerInput(layer, self.rows, query[0].transpose(0, 1), key, value, scaling, self._canvas)
        for hook in self._hooks:
            if hook.layers is None or layer in hook.layers:
                hook(at)
        self._canvas.write_pending(layer)

    def score_mod_of(self, layer: int) -> ScoreMod | None:
        """How this layer's rows weigh what they see, or None for plain attention."""
        return self.score_mod if self.score_mod is not None and layer >= self.score_mod.first_layer else None

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


def trailing(queries: int, keys: int, device: torch.device, texts: int = 1) -> SparseRows:
    """The newest slots as rows, for a forward that says nothing: any ordinary decoding step.

    Raises `ConfigurationError` for a batch of several ``texts``, whose padding nothing here knows of.
    """
    if texts != 1:
        raise ConfigurationError(
            f"this model was given to cacheclip_rag.Backbone, whose attention takes one text at a time, not {texts}: "
            "load another model for batches"
        )
    return SparseRows(torch.arange(keys - queries, keys), device)
