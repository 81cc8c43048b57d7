"""Where the KV of each token of a prompt came from, run-length encoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from ..deprecation import renamed_attribute


class TokenSource(IntEnum):
    """Where the KV of a prompt token came from: computed, reused from a chunk, or cached from an earlier prompt."""

    FRESH = 0
    """Computed: question, template, unknown text."""
    EDGE = 1
    """Computed: inside a known chunk, but split differently by the tokenizer than when the chunk was stored."""
    REUSED = 2
    """Stored chunk KV, rotated to its position and otherwise unchanged."""
    RECOMPUTED = 3
    """Stored chunk KV that was recomputed."""
    IN_PLACE = 4
    """Stored chunk KV right behind the prefix it was encoded behind: needs no repair."""
    EXACT = 4  # the former name of IN_PLACE
    PREFIX = 5
    """Prompt prefix whose KV was cached from an earlier request (prefix caching)."""
    ADJUSTED = 6
    """Stored chunk KV, adjusted by the change of recomputed tokens of its chunk (`recompute.carry`); not computed."""


@dataclass(frozen=True)
class Run:
    """Adjacent tokens of one source, within one chunk or outside chunks.

    Characters ``[start, end)`` of the prompt; ``tokens`` tokens from ``row`` on.
    """

    source: TokenSource
    start: int
    end: int
    row: int
    tokens: int

    fate = renamed_attribute("fate", "source")


@dataclass(frozen=True, eq=False, repr=False)
class TokenSources:
    """The source of every token of a prompt, as runs, with a reference to the prompt.

    ``rows [R]`` int32: the first token of each run; ``characters [R]`` int32: its first character in the prompt;
    ``kinds [R]`` uint8: its `TokenSource`; ``tokens``: tokens of the prompt. Some ten bytes per run.
    """

    prompt: str
    rows: np.ndarray
    characters: np.ndarray
    kinds: np.ndarray
    tokens: int

    @classmethod
    def of(cls, prompt: str, starts: np.ndarray, kinds: np.ndarray, borders: Sequence[int] = ()) -> TokenSources:
        """From ``starts [T]`` (the first character of each token) and ``kinds [T]`` (its `TokenSource`).

        Runs are split at ``borders``, the characters at which chunks begin or end.
        """
        changes = np.diff(kinds, prepend=-1) != 0
        rows = np.union1d(np.flatnonzero(changes), np.searchsorted(starts, np.asarray(borders, dtype=np.int64)))
        rows = rows[rows < len(kinds)]
        characters, kept = starts[rows].astype(np.int32), kinds[rows].astype(np.uint8)
        return cls(prompt, rows.astype(np.int32), characters, kept, len(kinds))

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        """Without the prompt, which may be long and does not belong in logs."""
        return f"TokenSources({self.tokens} tokens in {len(self)} runs)"

    def runs(self) -> Iterator[Run]:
        """The runs in order; together they cover the whole prompt."""
        rows = [*self.rows.tolist(), self.tokens]
        edges = [0, *self.characters[1:].tolist(), len(self.prompt)]
        for number, kind in enumerate(self.kinds.tolist()):
            row, stop = rows[number], rows[number + 1]
            yield Run(TokenSource(kind), edges[number], edges[number + 1], row, stop - row)

    def counts(self) -> dict[TokenSource, int]:
        """The number of tokens of each source, including sources without any."""
        sizes = np.diff(self.rows, append=self.tokens)
        totals = np.bincount(self.kinds, weights=sizes, minlength=len(TokenSource))
        return {source: int(totals[source]) for source in TokenSource}
