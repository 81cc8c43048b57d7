"""The question's own attention, in the primary model, chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...errors import ConfigurationError
from ...model.attention import AttentionProbe
from ...model.backbone import Backbone
from ...spec import at_least
from ..request import Request
from .budget import windows


@dataclass(frozen=True)
class QueryGuided:
    """``s[t] = mean_{l in layers} mean_{h, q} softmax(q K^T / sqrt(D))[h, q, t]``: one pass of the question over the
    placed chunks, whose KV is overwritten afterwards.

    ``layers``: ``"last"``, ``"all"``, or a band of relative depths, ``(0.69, 0.83)``, after which the pass stops.
    ``normalise``: over which keys the softmax runs (see `AttentionProbe`). ``window`` and ``threshold`` group the
    choice as CacheClip does; a window of 1 takes single tokens.

    FusionRAG (2601.12904): last layer, softmax inside each chunk; its code scores keys at their stored positions, we at
    their global ones, which InfoFlow measured to be better. ProphetKV (2602.02579): all layers, softmax over the
    context. InfoFlow (2603.05353): a band of mid-late layers, softmax over the whole row.
    """

    layers: Literal["last", "all"] | tuple[float, float] = "last"
    normalise: Literal["row", "context", "chunk"] = "row"
    window: int = 8
    threshold: int = 1

    needs_auxiliary: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_least(1, window=self.window, threshold=self.threshold)
        if isinstance(self.layers, tuple) and not 0.0 <= self.layers[0] <= self.layers[1] <= 1.0:
            raise ConfigurationError(f"layers is a band of depths from 0 to 1, as (0.69, 0.83), not {self.layers}")

    def select(self, request: Request, budget: int) -> Tensor:
        scores = question_scores(request, self._layers(request.backbone), self.normalise)
        return request.rows[windows(scores.cpu(), request.groups, budget, self.window, self.threshold)]

    def _layers(self, backbone: Backbone) -> list[int]:
        if self.layers == "last":
            return backbone.full_layers[-1:]
        if self.layers == "all":
            return backbone.full_layers
        low, high = (round(depth * backbone.layers) for depth in self.layers)
        return [i for i in backbone.full_layers if low <= i < max(high, low + 1)] or backbone.full_layers[-1:]


def question_scores(
    request: Request, layers: list[int], normalise: Literal["row", "context", "chunk"] = "row"
) -> Tensor:
    """Attention from the question to every row in ``request.rows`` in one pass over the stale canvas: ``[N]`` float32.

    The pass computes the rows without stored KV (they would be holes otherwise). A question that does not stand behind
    the last chunk sees nothing of the context where it stands: a copy of it then runs at the end of the prompt.
    """
    backbone, canvas, layout = request.backbone, request.canvas, request.layout
    rows, ids, scored = request.fresh, layout.ids[request.fresh], request.question_rows
    positions = request.positions[rows]
    if len(scored) == 0 or int(scored[0]) < int(request.rows[-1]):
        copy = backbone.tokenise("\n\n" + request.question, plain=True).ids[: canvas.capacity - len(layout)]
        scored = torch.arange(len(layout), len(layout) + len(copy))
        rows, ids = torch.cat([rows, scored]), torch.cat([ids, copy])
        positions = torch.cat([positions, scored - len(layout) + int(request.positions[-1]) + 1])
    device = backbone.device
    probe = AttentionProbe(
        scored.to(device),
        request.rows.to(device),
        layers,
        normalise,
        request.groups.to(device),
    )
    length = canvas.length
    backbone.forward(ids, rows, canvas, positions=positions, logits=0, probe=probe, depth=max(layers) + 1)
    canvas.length = length  # the pass leaves nothing behind that the recompute does not overwrite
    return probe.scores
