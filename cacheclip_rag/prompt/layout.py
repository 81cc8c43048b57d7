"""One prompt, token by token: which tokens can take their KV from a stored chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .index import Span

RUN_COST, PASS_COST = 8, 64
"""What putting one piece of stored KV in its place costs, and what a selection's pass of the model costs besides its
tokens, both in tokens that are computed (`python benchmarks/outright.py`)."""
SHORT = 512
"""Tokens of a prompt below which nothing is weighed: it is a matter of a tenth of a second, and a first try of one
small chunk should show what reuse does. Reuse took up to 1.65 of a full prefill there, in processor time."""
OWN_RATIO = 0.2
"""The share of chunk tokens that methods recompute by default, at most; who asks for more wants it, however long it
takes."""


@dataclass(frozen=True, eq=False)
class Layout:
    """One prompt, token by token, and where each token's KV can come from.

    ``ids [T]`` int64, ``offsets [T, 2]`` int64 (characters of ``prompt``); ``chunk [T]`` int64: index into ``spans`` of
    the chunk span whose stored KV fits the token, or -1; ``token [T]`` int64: the token's index in that chunk, or -1;
    ``edge [T]`` bool: inside a span, but tokenised differently than in the chunk, so computed afresh. Negative ids are
    `soft` tokens, which have no characters.
    """

    prompt: str
    ids: Tensor
    offsets: Tensor
    spans: tuple[Span, ...]
    chunk: Tensor
    token: Tensor
    edge: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def reusable(self) -> Tensor:
        """``[T]`` bool: tokens with stored KV."""
        return self.chunk >= 0

    @property
    def soft(self) -> Tensor:
        """``[T]`` bool: tokens that are no part of the prompt's text (see `soft.SoftTokens`)."""
        return self.ids < 0

    def text_only(self) -> Layout:
        """The layout of the prompt's text, without soft tokens."""
        if not bool((soft := self.soft).any()):
            return self
        parts = {name: getattr(self, name)[~soft] for name in ("ids", "offsets", "chunk", "token", "edge")}
        return dataclasses.replace(self, **parts)

    def tokens_each(self, rows: Tensor) -> Tensor:
        """How many of ``rows [n]`` hold a token of each span's chunk, ``[spans]`` int64."""
        return torch.bincount(self.chunk[rows] + 1, minlength=len(self.spans) + 1)[1:]

    def runs(self) -> list[tuple[int, int, slice]]:
        """``(span, row, tokens)``: maximal runs of rows that hold consecutive tokens of one span's chunk."""
        chunk, token = self.chunk.numpy(), self.token.numpy()
        rows = np.flatnonzero(chunk >= 0)
        if not len(rows):
            return []
        breaks = (np.diff(rows) != 1) | (np.diff(token[rows]) != 1) | (np.diff(chunk[rows]) != 0)
        starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
        ends = np.concatenate([starts[1:], [len(rows)]])
        return [
            (int(chunk[rows[a]]), int(rows[a]), slice(int(token[rows[a]]), int(token[rows[b - 1]]) + 1))
            for a, b in zip(starts, ends, strict=True)
        ]


def outright(layout: Layout, passes: float = 0.0, prefix: int = 0, ratio: float = 0.0) -> str | None:
    """Why full prefill of this prompt is faster than reuse, or None if it is not.

    Tokens without stored KV are computed ``passes`` more times than once: 1 for a selection that first runs them
    through the whole model, less if it stops at a depth. The KV of the first ``prefix`` tokens is there from an earlier
    prompt. ``ratio`` of the tokens with stored KV is recomputed, of which `OWN_RATIO` counts. None for a prompt
    below `SHORT`.
    """
    count, reusable, runs = len(layout), int(layout.reusable.sum()), len(layout.runs())
    saved = prefix + reusable * (1 - min(ratio, OWN_RATIO)) - passes * (count - reusable - prefix)
    if not reusable or count < SHORT or saved > RUN_COST * runs + PASS_COST * (passes > 0):
        return None
    return (
        f"full prefill: {reusable:,} of {count:,} tokens have stored KV, in {runs:,} pieces; "
        "putting them together would take longer"
    )


def align(
    prompt: str,
    ids: Tensor,
    offsets: Tensor,
    spans: Sequence[Span],
    tokens: Sequence[tuple[Tensor, Tensor] | None],
) -> Layout:
    """Match the prompt's tokens with the stored ones of each span's chunk.

    ``ids [T]``, ``offsets [T, 2]``: one tokenisation of the whole prompt, the one a model without cache would see.
    ``tokens[i]`` is ``(ids [n], offsets [n, 2])`` of span i's chunk, or None if its KV is missing. A token is reusable
    when it lies inside the span and the stored chunk has the same id at the same characters; where the neighbouring
    text made the tokenizer cut differently (a token or two at an edge) it is not, and is computed.
    """
    count = len(ids)
    chunk = np.full(count, -1, dtype=np.int64)
    token = np.full(count, -1, dtype=np.int64)
    edge = np.zeros(count, dtype=bool)
    characters = offsets.numpy()
    known: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # each chunk's codes and their order: it may stand there often
    starts = np.searchsorted(characters[:, 0], [span.start for span in spans])
    stops = np.searchsorted(characters[:, 0], [span.end for span in spans])
    for number, (span, stored) in enumerate(zip(spans, tokens, strict=True)):
        rows = slice(int(starts[number]), int(stops[number]))
        if stored is None or rows.start == rows.stop or not len(stored[0]):
            continue
        mine = _codes(characters[rows] - (span.start - span.offset))
        if id(stored[1]) not in known:
            codes = _codes(stored[1].numpy())
            known[id(stored[1])] = codes, np.argsort(codes, kind="stable")
        theirs, order = known[id(stored[1])]
        place = order[np.searchsorted(theirs, mine, sorter=order).clip(max=len(theirs) - 1)]
        same = (theirs[place] == mine) & (stored[0].numpy()[place] == ids.numpy()[rows])
        same &= characters[rows, 1] <= span.end
        chunk[rows] = np.where(same, number, -1)
        token[rows] = np.where(same, place, -1)
        edge[rows] = ~same & (characters[rows, 1] > characters[rows, 0])  # a begin-of-sequence token has no characters
    return Layout(
        prompt,
        ids,
        offsets,
        tuple(spans),
        torch.from_numpy(chunk),
        torch.from_numpy(token),
        torch.from_numpy(edge),
    )


def _codes(offsets: np.ndarray) -> np.ndarray:
    """One int64 for each token's span and its place among the tokens that share it (the bytes of an emoji).

    That place is a number and how many they are: where a first byte was merged into the token before, the others are
    not the same bytes any more.
    """
    if not len(offsets):
        return np.zeros(0, dtype=np.int64)
    repeats = np.concatenate([[False], (offsets[1:] == offsets[:-1]).all(axis=1)])
    first = np.flatnonzero(~repeats)
    size = np.diff(np.append(first, len(offsets)))
    rank = np.arange(len(offsets)) - np.repeat(first, size)
    length = (offsets[:, 1] - offsets[:, 0]).clip(max=0xFFF)
    codes: np.ndarray = (offsets[:, 0] << 28) + (length << 16) + (rank.clip(max=0xFF) << 8)
    return codes + np.repeat(size, size).clip(max=0xFF)
