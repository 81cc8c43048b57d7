"""A prompt with placed chunk KV, as selectors and recompute steps see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..chunks import ChunkKV
from ..compute import Computer, Hook, Part, ScoreMod, Workspace
from ..prompt import Layout

if TYPE_CHECKING:
    from .auxiliary import CharacterScores


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt whose stored chunk KV is placed in a workspace.

    ``positions [T]`` int64: the RoPE position of every prompt token; ``chunks``: the stored chunk of each span of the
    layout, or None. ``rows [N]`` int64, sorted: the rows a selector may choose from, tokens whose stored KV is placed
    and needs repair; ``groups [N]`` int64: the number of the span each belongs to. ``fresh [M]`` int64: the rows
    without stored KV, which are always computed. ``question`` is the question's text, ``question_rows [q]`` its rows in
    the prompt (empty if it is not in there), and ``question_ids [p]`` its tokens, for a copy behind the prompt.
    ``logits``: how many of the prompt's last rows need logits; 0 where another engine samples.
    ``auxiliary(layers)`` returns the auxiliary model's scores of each span's chunk.
    """

    layout: Layout
    positions: Tensor
    chunks: tuple[ChunkKV | None, ...]
    workspace: Workspace
    computer: Computer
    auxiliary: Callable[[str], list[CharacterScores]]
    rows: Tensor
    groups: Tensor
    fresh: Tensor
    question: str
    question_rows: Tensor
    question_ids: Tensor
    logits: int = 1

    def part(
        self,
        rows: Tensor,
        x: Tensor | None = None,
        *,
        hooks: Sequence[Hook] = (),
        score_mod: ScoreMod | None = None,
        workspace: Workspace | None = None,
    ) -> Part:
        """These rows of the prompt as part of a forward, from token ids or from the residual stream ``x [S, d]``."""
        ids = self.layout.ids[rows] if x is None else x
        return Part(workspace or self.workspace, ids, rows, self.positions[rows], hooks, score_mod)


def merge_rows(*rows: Tensor) -> Tensor:
    """The union of disjoint sets of rows, sorted."""
    return torch.cat(rows).sort().values
