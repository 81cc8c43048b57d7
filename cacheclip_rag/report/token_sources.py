"""What became of every token of a prompt, kept small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from ..deprecation import renamed_attribute


class TokenSource(IntEnum):
    """What became of a token. Of several that fit, the last."""

    FRESH = 0
    """Computed: question, template, unknown text."""
    EDGE = 1
    """Computed: inside a known chunk, but cut differently by the tokenizer than when the chunk was stored."""
    REUSED = 2
    """The stored KV as it is, moved to its place."""
    RECOMPUTED = 3
    """Had stored KV and was refreshed."""
    IN_PLACE = 4
    """Stored KV right behind the prefix it was computed behind: nothing to repair."""
    EXACT = 4  # the former name of IN_PLACE
    PREFIX = 5
    """The beginning of the prompt, kept from an earlier request (prefix caching)."""
    ADJUSTED = 6
    """The stored KV, moved by what recomputing changed in other tokens of its chunk; not computed."""


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one source, in or outside of one chunk.

    Characters ``[start, end)`` of the prompt; ``tokens`` of them, from ``row`` on.
    """

    source: TokenSource
    start: int
    end: int
    row: int
    tokens: int

    fate = renamed_attribute("fate", "source")


@dataclass(frozen=True, eq=False, repr=False)
class TokenSources:
    """The token_sources of a prompt's tokens, run by run, and the prompt itself, by reference.

    ``rows [R]`` int32: the first token of each run; ``characters [R]`` int32: where in the prompt it begins;
    ``kinds [R]`` uint8: its `TokenSource`; ``tokens``: how many the prompt has. Some ten bytes a run.
    """

    prompt: str
    rows: np.ndarray
    characters: np.ndarray
    kinds: np.ndarray
    tokens: int

    @classmethod
    def of(cls, prompt: str, starts: np.ndarray, kinds: np.ndarray, borders: Sequence[int] = ()) -> TokenSources:
        """From ``starts [T]`` (the first character of each token) and ``kinds [T]`` (its `TokenSource`).

        No run goes on past one of ``borders``: characters at which a chunk begins or ends.
        """
        changes = np.diff(kinds, prepend=-1) != 0
        rows = np.union1d(np.flatnonzero(changes), np.searchsorted(starts, np.asarray(borders, dtype=np.int64)))
        rows = rows[rows < len(kinds)]
        characters, kept = starts[rows].astype(np.int32), kinds[rows].astype(np.uint8)
        return cls(prompt, rows.astype(np.int32), characters, kept, len(kinds))

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        """Without the prompt: it may be long, and none of a log's business."""
        return f"TokenSources({self.tokens} tokens in {len(self)} runs)"

    def runs(self) -> Iterator[Run]:
        """In order; together they are the whole prompt and all its tokens."""
        rows = [*self.rows.tolist(), self.tokens]
        edges = [0, *self.characters[1:].tolist(), len(self.prompt)]
        for number, kind in enumerate(self.kinds.tolist()):
            row, stop = rows[number], rows[number + 1]
            yield Run(TokenSource(kind), edges[number], edges[number + 1], row, stop - row)

    def counts(self) -> dict[TokenSource, int]:
        """Tokens of each source, every source named."""
        sizes = np.diff(self.rows, append=self.tokens)
        totals = np.bincount(self.kinds, weights=sizes, minlength=len(TokenSource))
        return {source: int(totals[source]) for source in TokenSource}
