"""The causal mask of one forward: its rows and floors, with the hooks and score modification of their attention."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...compute import Hook, LayerInput, ScoreMod, Workspace, visible
from ...errors import ConfigurationError

BLOCK = 128
"""Rows per call of the fused kernel: in blocks of this size, few masked keys are computed."""

_KEEP = 1 << 27
"""Masks of at most this many elements are cached for all layers of a forward; larger ones are rebuilt by each layer."""


class Block(NamedTuple):
    """Rows ``[start, stop)``, the slots of the first and the last of them, and the first slot that they may see.

    Python integers, so that no layer waits for a device synchronisation.
    """

    start: int
    stop: int
    first: int
    last: int
    floor: int


class PendingWorkspace(Workspace, Protocol):
    """A workspace that buffers a layer's new KV until hooks have seen it."""

    def pending(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The layer's new keys and values ``[1, Hk, S, D]``, or None."""

    def write_pending(self, layer: int) -> None:
        """Write the buffered KV of a layer to its slots."""


class SparseRows:
    """The rows of one forward, with the mask, hooks and score modification of their attention.

    ``rows [S]`` int64, strictly increasing: the canvas slots of the queries. Slots order keys and define causality;
    RoPE positions are passed separately, as ``position_ids``. ``floors [S]`` int64, non-decreasing, separate texts that
    share a canvas: a row attends to no slot below its floor. Hooks and score modifications need a single text.
    ``canvas`` holds the placed KV, and the new KV of a layer until its hooks have run. ``pause(rows)`` is called by
    each layer before its attention, and may run other forwards.
    """

    def __init__(
        self,
        rows: Tensor,
        device: torch.device | str,
        canvas: PendingWorkspace | None = None,
        hooks: Sequence[Hook] = (),
        score_mod: ScoreMod | None = None,
        floors: Tensor | None = None,
        pause: Callable[[int], None] | None = None,
    ) -> None:
        if floors is not None and (hooks or score_mod is not None):
            raise ValueError("floors go with neither hooks nor a score modification")
        slots = rows.tolist()
        self.rows, self.score_mod = rows.to(device), score_mod
        self.floors = None if floors is None else floors.to(device)
        self.blocks = list(_blocks(slots, [0] * len(slots) if floors is None else floors.tolist()))
        self.dense = floors is None and slots[0] == 0 and slots[-1] == len(slots) - 1
        """Whether the rows are all slots from 0 on, so that the mask is an ordinary triangle."""
        self._canvas, self._hooks, self._pause = canvas, tuple(hooks), pause
        self._biases: dict[tuple[int, int, int, int | None], Tensor] = {}

    @property
    def hooked(self) -> bool:
        """Whether there are hooks, for which layers buffer their new KV until `before_attention`."""
        return bool(self._hooks)

    def before_attention(self, layer: int, query: Tensor, scaling: float) -> None:
        """Call the hooks of a layer with its ``query [1, H, S, D]`` and its new KV, then write the KV."""
        if self._pause is not None:
            self._pause(query.shape[2])
        if not self._hooks or self._canvas is None or (new := self._canvas.pending(layer)) is None:
            return
        key, value = (one[0].transpose(0, 1) for one in new)
        at = LayerInput(layer, self.rows, query[0].transpose(0, 1), key, value, scaling, self._canvas)
        for hook in self._hooks:
            if hook.layers is None or layer in hook.layers:
                hook(at)
        self._canvas.write_pending(layer)

    def score_mod_of(self, layer: int) -> ScoreMod | None:
        """The score modification of this layer, or None for plain attention."""
        return self.score_mod if self.score_mod is not None and layer >= self.score_mod.first_layer else None

    def bias(self, start: int, stop: int, keys: slice, groups: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """The additive mask (0 or -inf) of the scores of rows ``[start, stop)`` over the slots ``keys``.

        ``[groups * rows, keys]``, the rows once per query head of a KV head. Layers of one forward share it. It is
        additive because the CPU's fused kernel converts a boolean mask at every call, which takes nearly as long as the
        attention.
        """
        name = (start, keys.start, groups, window)
        if name not in self._biases:
            seen = visible(self.rows[start:stop] - keys.start, keys.stop - keys.start, window)
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
            bias = bias.repeat(groups, 1)
            if groups * len(self.rows) * (keys.stop - keys.start) > _KEEP:
                return bias
            self._biases[name] = bias
        return self._biases[name]


def _blocks(slots: list[int], floors: list[int]) -> Iterator[Block]:
    """Consecutive rows in blocks of at most `BLOCK`, with one floor per block."""
    start = 0
    while start < len(slots):
        stop = min(start + BLOCK, bisect_right(floors, floors[start]))
        yield Block(start, stop, slots[start], slots[stop - 1], floors[start])
        start = stop


def trailing(queries: int, keys: int, device: torch.device, texts: int = 1) -> SparseRows:
    """The newest slots as rows, for a forward without a ``cacheclip`` argument, such as an ordinary decoding step.

    Raises `ConfigurationError` for a batch of several ``texts``, because padding is not supported.
    """
    if texts != 1:
        raise ConfigurationError(
            f"this model was given to cacheclip_rag.Backbone, whose attention takes one text at a time, not {texts}: "
            "load another model for batches"
        )
    return SparseRows(torch.arange(keys - queries, keys), device)
