"""Selectors by the primary model's own attention from the question: FusionRAG, ProphetKV, InfoFlow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...compute import Computer, Part
from ...deprecation import renamed_parameters
from ...errors import ConfigurationError
from ...spec import at_least
from ..request import Request
from ..scores import AttentionScores, Normalise
from .budget import top_groups

Queries = Literal["question", "last", "both"]


@renamed_parameters(window="group_size")
@dataclass(frozen=True)
class QueryGuided:
    """``s[t] = mean_{l in layers} mean_{h, q} softmax(q K^T / sqrt(D))[h, q, t]``: the question's attention to each
    token, in one pass of the question over the placed chunks.

    The pass's own KV is overwritten by the recompute. ``layers``: ``"last"``, ``"all"``, or a band of relative depths,
    ``(0.69, 0.83)``, behind which the pass stops. ``normalise``: over which keys the softmax runs (see
    `AttentionScores`). ``queries``: whose attention counts, that of the ``"question"``'s tokens, that of the prompt's
    ``"last"`` token, which predicts the answer's first one, or the mean of ``"both"``. ``group_size`` and ``threshold``
    group the choice as CacheClip does; a group size of 1 takes single tokens.

    FusionRAG (2601.12904): last layer, softmax inside each chunk; its code scores keys at their stored positions, ours
    at their positions in the prompt, which InfoFlow measured to be better. ProphetKV (2602.02579): all layers, softmax
    over the context. InfoFlow (2603.05353): a band of mid-late layers, softmax over the whole row. ``queries`` is
    our own.
    """

    layers: Literal["last", "all"] | tuple[float, float] = "last"
    normalise: Literal["row", "context", "chunk"] = "row"
    group_size: int = 8
    threshold: int = 1
    queries: Queries = "question"

    needs_auxiliary: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_least(1, group_size=self.group_size, threshold=self.threshold)
        if isinstance(self.layers, tuple) and not 0.0 <= self.layers[0] <= self.layers[1] <= 1.0:
            raise ConfigurationError(f"layers is a band of depths from 0 to 1, as (0.69, 0.83), not {self.layers}")

    @property
    def passes(self) -> float:
        """The cost of the question's pass, as a share of a forward over the same rows."""
        return self.layers[1] if isinstance(self.layers, tuple) else 1.0

    def select(self, request: Request, budget: int) -> Tensor:
        scores = question_scores(request, self._layers(request.computer), self.normalise, self.queries)
        return request.rows[top_groups(scores.cpu(), request.groups, budget, self.group_size, self.threshold)]

    def _layers(self, computer: Computer) -> list[int]:
        if self.layers == "last":
            return computer.full_layers[-1:]
        if self.layers == "all":
            return computer.full_layers
        low, high = (round(depth * computer.layers) for depth in self.layers)
        return [i for i in computer.full_layers if low <= i < max(high, low + 1)] or computer.full_layers[-1:]


def question_scores(
    request: Request, layers: list[int], normalise: Normalise = "row", queries: Queries = "question"
) -> Tensor:
    """Attention from the question, the prompt's last token, or the mean of both, to every row in ``request.rows``:
    ``[N]`` float32. It takes one pass over the placed KV.

    The pass also computes the other rows without stored KV, which the question attends to. If the question does not
    follow the last chunk, it cannot attend to all chunks from there; a copy of it then runs at the end of the prompt.
    """
    computer, workspace, layout = request.computer, request.workspace, request.layout
    rows, ids = request.fresh, layout.ids[request.fresh]
    positions, asking = request.positions[rows], [] if queries == "question" else [rows[-1:]]
    if queries != "last":
        scored = request.question_rows
        if len(scored) == 0 or int(scored[0]) < int(request.rows[-1]):
            room = workspace.capacity - len(layout)
            copy = request.question_ids[max(0, len(request.question_ids) - room) :]  # its end, where the question is
            scored = torch.arange(len(layout), len(layout) + len(copy))
            rows, ids = torch.cat([rows, scored]), torch.cat([ids, copy])
            positions = torch.cat([positions, scored - len(layout) + int(request.positions[-1]) + 1])
        asking.append(scored)
    device = computer.device
    columns, groups = request.rows.to(device), request.groups.to(device)
    hooks = [AttentionScores(q.to(device), columns, layers, normalise, groups, computer.windows) for q in asking]
    length = workspace.length
    computer.forward([Part(workspace, ids, rows, positions, hooks)], depth=max(layers) + 1, logits=0)
    workspace.length = length  # the recompute overwrites all that the pass wrote below it
    return computer.over_ranks(torch.stack([hook.scores for hook in hooks]).mean(dim=0))
