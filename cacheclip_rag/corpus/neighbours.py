"""Similar chunks by their embeddings: those are likely to be retrieved together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..chunks import canonical
from ..errors import ConfigurationError

Embed = Callable[[list[str]], Any]
"""An embedding function: ``n`` texts to ``[n, d]`` numbers, as an array or a list of lists."""

_BATCH = 1024
"""Texts per matrix product with all others."""


class Neighbourhood:
    """Every chunk's nearest neighbours by cosine similarity, updated as chunks are added and removed.

    ``count``: neighbours per chunk (fewer in a smaller corpus). ``tolerance``: the share of a chunk's neighbours that
    may be replaced before the chunk counts as changed. Texts that differ in surrounding blanks only are one chunk.
    Source: FusionRAG (arXiv 2601.12904), similarity-guided preprocessing: exact inner-product search.
    """

    def __init__(self, count: int = 10, tolerance: float = 0.3) -> None:
        if count < 1:
            raise ConfigurationError(f"count must be at least 1 neighbour, not {count}")
        if not 0.0 <= tolerance < 1.0:
            raise ConfigurationError(f"tolerance is a share from 0 to less than 1, not {tolerance}")
        self.count, self.tolerance = count, tolerance
        self._given: dict[str, list[str]] = {}
        self._vectors: dict[str, npt.NDArray[np.float32]] = {}
        self._width = 0

    def __len__(self) -> int:
        return len(self._vectors)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._vectors))

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and canonical(text) in self._vectors

    def add(self, texts: Sequence[str], vectors: Any) -> None:
        """Add chunks with their embeddings ``[n, d]``. Raises `ConfigurationError`, and adds none, if the number or the
        width of the embeddings is wrong, or if they are not finite.
        """
        try:
            given = np.array(vectors, dtype=np.float32)  # a copy, because it is normalised in place below
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"embeddings must be rows of numbers, all as long: {error}") from error
        if given.ndim != 2 or len(given) != len(texts):
            raise ConfigurationError(f"{len(texts)} texts need embeddings [{len(texts)}, d], not {list(given.shape)}")
        if self._width not in (0, given.shape[1]):
            raise ConfigurationError(
                f"embeddings of width {given.shape[1]} among such of width {self._width}: use one embedding model, or "
                "start anew with the new one"
            )
        if not np.isfinite(given).all():
            raise ConfigurationError("some embeddings are not finite numbers")
        if len(texts):
            self._width = given.shape[1]
        given /= np.maximum(np.linalg.norm(given, axis=1, keepdims=True), 1e-12)
        self._vectors.update(zip(map(canonical, texts), given, strict=True))

    def remove(self, texts: Iterable[str]) -> None:
        """Remove chunks. Those that had one of them as a neighbour count as `changed`, even if it is added again."""
        gone = set(map(canonical, texts)) & self._vectors.keys()
        for text in gone:
            del self._vectors[text]
        if gone:
            self._given = {t: had for t, had in self._given.items() if t not in gone and gone.isdisjoint(had)}

    def nearest(self, texts: Iterable[str] | None = None) -> dict[str, list[str]]:
        """The neighbours of these chunks (None: of all), the most similar first. Unknown texts are skipped."""
        known = list(self._vectors)
        wanted = known if texts is None else [t for t in dict.fromkeys(map(canonical, texts)) if t in self._vectors]
        if not wanted:
            return {}
        matrix = np.stack(list(self._vectors.values()))
        place = {text: number for number, text in enumerate(known)}
        found: dict[str, list[str]] = {}
        for start in range(0, len(wanted), _BATCH):
            mine = [place[text] for text in wanted[start : start + _BATCH]]
            scores = matrix[mine] @ matrix.T
            scores[np.arange(len(mine)), mine] = -np.inf
            kept = _largest(scores, min(self.count, len(known) - 1))
            found |= {known[n]: [known[other] for other in row] for n, row in zip(mine, kept, strict=True)}
        return found

    def changed(self) -> dict[str, list[str]]:
        """The neighbours of chunks that are new, or whose neighbours changed since they were last `settled`."""
        changed = {}
        for text, now in self.nearest().items():
            before = self._given.get(text)
            fresh = len(set(now) - set(before or ()))
            if before is None or fresh > self.tolerance * max(1, len(now)):
                changed[text] = now
        return changed

    def settled(self, neighbours: Mapping[str, list[str]]) -> None:
        """Record that these chunks were fused with these neighbours, so that they no longer count as `changed`."""
        self._given |= {canonical(text): given for text, given in neighbours.items() if text in self}


def _largest(scores: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """Indices ``[n, count]`` of the largest scores of each row of ``[n, m]``, the largest first; ``count`` < m."""
    places = np.sort(np.argpartition(-scores, count, axis=1)[:, :count], axis=1)
    order = np.argsort(-np.take_along_axis(scores, places, axis=1), axis=1, kind="stable")  # ties: the first wins
    return np.take_along_axis(places, order, axis=1)


def similar(texts: Sequence[str], embed: Embed, count: int = 10) -> dict[str, list[str]]:
    """The ``count`` most similar texts of each text, the most similar first (see `Neighbourhood`).

    ``embed`` is called with up to 256 texts at a time. Raises what it raises, and `ConfigurationError` if it returns
    no valid embeddings.
    """
    neighbourhood = Neighbourhood(count)
    unique = list(dict.fromkeys(map(canonical, texts)))
    for start in range(0, len(unique), 256):
        batch = unique[start : start + 256]
        neighbourhood.add(batch, embed(batch))
    return neighbourhood.nearest()
