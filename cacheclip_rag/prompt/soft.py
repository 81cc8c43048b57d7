"""Soft tokens: trained vectors beside a chunk's tokens. They have rows and positions in a prompt, and no text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .layout import Layout
from .tokens import Tokens

SoftKind = Literal["links", "packet"]
"""What `cacheclip tune` trains soft tokens for; also the stem of their file's name."""

KINDS: tuple[SoftKind, ...] = ("links", "packet")


@dataclass(frozen=True, eq=False)
class SoftTokens:
    """The soft tokens around every chunk: the ids ``before [h]`` and ``behind [t]`` int64, all negative: -1 is the
    first vector that was trained (see `model.soft`).

    ``stored``: their KV is computed and stored with the chunk's, as part of it; else it is computed with each prompt.
    """

    before: Tensor
    behind: Tensor
    stored: bool

    @classmethod
    def of(cls, before: int, behind: int, stored: bool) -> SoftTokens:
        """So many of them before and behind each chunk."""
        ids = -1 - torch.arange(before + behind)
        return cls(ids[:before], ids[before:], stored)

    def __len__(self) -> int:
        return len(self.before) + len(self.behind)

    def wrapped(self, tokens: Tokens) -> Tokens:
        """A chunk's tokens as they are encoded: with the soft ones, if those are stored. Its own tokens may have them
        already.
        """
        if not (self.stored and len(self)):
            return tokens
        own = tokens.ids >= 0
        ids, offsets = tokens.ids[own], tokens.offsets[own]
        first, last = (offsets[:1, :1], offsets[-1:, 1:]) if len(ids) else (torch.zeros(1, 1, dtype=torch.long),) * 2
        edges = first.expand(len(self.before), 2), last.expand(len(self.behind), 2)
        return Tokens(torch.cat([self.before, ids, self.behind]), torch.cat([edges[0], offsets, edges[1]]))

    def around(self, layout: Layout, tokens: Sequence[Tokens | None]) -> Layout:
        """``layout`` with rows for the soft tokens around every chunk that it has stored KV of; ``tokens``: those of
        each span's chunk, `wrapped`.

        They stand before the first and behind the last token whose KV is stored, with no characters. None stand behind
        the prompt's last token, which has to stay the last.
        """
        if not len(self):
            return layout
        rows, ids, chunk, token, character = (list[int]() for _ in range(5))

        def put(row: int, soft: Tensor, number: int, first: int, at: int) -> None:
            count = len(soft)
            rows.extend([row] * count)
            ids.extend(soft.tolist())
            chunk.extend([number if self.stored else -1] * count)
            token.extend(range(first, first + count) if self.stored else [-1] * count)
            character.extend([at] * count)

        for number, stored in enumerate(tokens):
            mine = (layout.chunk == number).nonzero()[:, 0]
            if stored is None or not len(mine):
                continue
            first, last = int(mine[0]), int(mine[-1])
            put(first, self.before, number, 0, int(layout.offsets[first, 0]))
            if last + 1 < len(layout):
                put(last + 1, self.behind, number, len(stored) - len(self.behind), int(layout.offsets[last, 1]))

        def inserted(into: Tensor, values: Sequence[int | bool]) -> Tensor:
            return torch.from_numpy(np.insert(into.numpy(), rows, values))

        starts, ends = (inserted(column, character) for column in layout.offsets.T)
        return dataclasses.replace(
            layout,
            ids=inserted(layout.ids, ids),
            offsets=torch.stack([starts, ends], dim=1),
            chunk=inserted(layout.chunk, chunk),
            token=inserted(layout.token, token),
            edge=inserted(layout.edge, [False] * len(rows)),
        )


NO_SOFT_TOKENS = SoftTokens.of(0, 0, stored=False)
