"""What composing a prompt passes from stage to stage: chunks loaded, tokens aligned with theirs, KV placed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..chunks import ChunkKV
from ..methods.auxiliary import CharacterScores
from ..methods.request import Request
from ..model.canvas import Canvas
from ..prompt import Layout
from .reading import Reading


@dataclass(frozen=True, eq=False)
class Loaded:
    """The stored chunk of each span, or None, and by key the reason why it is ``missing``.

    ``in_place``: whether a chunk right behind its encode prefix needs no repair.
    """

    chunks: Sequence[ChunkKV | None]
    missing: Mapping[str, str] = field(default_factory=dict)
    in_place: bool = True


@dataclass(frozen=True, eq=False)
class Aligned:
    """A prompt whose tokens are aligned with those of its stored chunks. ``scores`` gives the auxiliary model's."""

    reading: Reading
    loaded: Loaded
    layout: Layout
    scores: Callable[[str], list[CharacterScores]]

    def without_chunks(self) -> Aligned:
        """The same prompt, as if no chunk had stored KV."""
        spans = self.reading.spans
        layout = self.reading.layout([(span, None) for span in spans])
        loaded = dataclasses.replace(self.loaded, chunks=[None] * len(spans))
        return dataclasses.replace(self, loaded=loaded, layout=layout)


@dataclass(frozen=True, eq=False)
class Placed:
    """A prompt whose stored KV is placed on a canvas: the method's `Request`, and facts for the report.

    The first ``prefix`` rows come from an earlier prompt. ``held [T]`` bool: rows with stored KV; ``in_place [T]``
    bool: those of them that need no repair.
    """

    request: Request
    canvas: Canvas
    loaded: Loaded
    prefix: int
    held: Tensor
    in_place: Tensor
