"""What a method sees of one prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..chunks import ChunkKV
from ..model.backbone import Backbone
from ..model.canvas import Canvas
from ..prompt import Layout
from .auxiliary import CharacterScores


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
