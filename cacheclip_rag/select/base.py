"""What a selector sees and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from ..auxiliary import CharacterScores
from ..backbone import Backbone
from ..canvas import Canvas
from ..chunks import ChunkKV
from ..prompt import Layout


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt on its way through the engine.

    ``positions [T]`` int64: the RoPE position of every prompt token; ``chunks``: the stored chunk of each of the
    layout's spans, where it is there. ``rows [N]`` int64: the canvas rows a selector may choose from, sorted: tokens
    whose stored KV is placed and not known to be exact; ``groups [N]`` int64: the number of the chunk span each belongs
    to. ``fresh [M]`` int64: the rows without stored KV, which are computed anyway. ``question`` is the question's text
    and ``question_rows [q]`` where it stands in the prompt (empty when it does not). ``auxiliary(layers)`` gives the
    auxiliary model's scores of each span's chunk.
    """

    layout: Layout
    positions: Tensor
    chunks: tuple[ChunkKV | None, ...]
    canvas: Canvas
    backbone: Backbone
    auxiliary: Callable[[str], list[CharacterScores]]
    rows: Tensor
    groups: Tensor
    fresh: Tensor
    question: str
    question_rows: Tensor


class Selector(Protocol):
    """Chooses rows. Frozen dataclasses."""

    needs_auxiliary: ClassVar[bool]

    def select(self, request: Request, budget: int) -> Tensor:
        """``[budget]`` (at most) of ``request.rows``, sorted, int64."""
