"""What a method sees of one prompt."""

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

    ``positions [T]`` int64: the RoPE position of every prompt token; ``chunks``: the stored chunk of each of the
    layout's spans, where it is there. ``rows [N]`` int64: the rows a selector may choose from, sorted: tokens whose
    stored KV is placed and needs repair; ``groups [N]`` int64: the number of the chunk span each belongs to.
    ``fresh [M]`` int64: the rows without stored KV, which are computed anyway. ``question`` is the question's text,
    ``question_rows [q]`` where it stands in the prompt (empty when it does not), and ``question_ids [p]`` its tokens,
    for a copy behind the prompt. ``auxiliary(layers)`` gives the auxiliary model's scores of each span's chunk.
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

    def part(
        self,
        rows: Tensor,
        x: Tensor | None = None,
        *,
        hooks: Sequence[Hook] = (),
        score_mod: ScoreMod | None = None,
        workspace: Workspace | None = None,
    ) -> Part:
        """These rows of the prompt in a forward, from their token ids or from the residual stream ``x [S, d]``."""
        ids = self.layout.ids[rows] if x is None else x
        return Part(workspace or self.workspace, ids, rows, self.positions[rows], hooks, score_mod)


def merge_rows(*rows: Tensor) -> Tensor:
    """Disjoint sets of rows as one, sorted."""
    return torch.cat(rows).sort().values
