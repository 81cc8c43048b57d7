"""Fuses the chunks of a growing collection with their nearest neighbours by embedding."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from ..errors import ConfigurationError
from .held_ids import canonical

if TYPE_CHECKING:
    from ..engine import Engine

log = logging.getLogger("cacheclip_rag")

_BATCH = 256
_PATIENCE = 3
"""Texts whose embeddings fail one after another before it is taken to be the function that fails."""


class Fuser:
    """Keeps every chunk that an engine knows fused with the ``count`` others most like it.

    ``embed``: a function of texts that gives their embeddings; it is asked for each text once, for those too that were
    ingested by earlier processes. Thread-safe. Copied or pickled, it begins with no embeddings.
    """

    def __init__(self, count: int, embed: Callable[[list[str]], Any]) -> None:
        """Raises ConfigurationError unless ``count`` is a whole number of at least 1."""
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigurationError(f"fuse is how many similar chunks each is fused with, 1 or more, not {count!r}")
        self._count, self._embed = count, embed
        self._begin()

    def _begin(self) -> None:
        from ..corpus.neighbours import Neighbourhood  # which loads torch

        self._neighbourhood = Neighbourhood(self._count)
        self._lock = threading.Lock()
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_count": self._count, "_embed": self._embed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __call__(
        self,
        engine: Engine,
        show_progress: bool = True,
        *,
        vectors: Mapping[str, Any] | None = None,
        without: Collection[str] = (),
    ) -> None:
        """Fuse what is new and what has got new neighbours, with a progress bar once it takes over a second.

        ``vectors``: embeddings that are there already, by text. ``without``: texts that are about to be forgotten, and
        that nothing is fused with. Never raises: a chunk that is not fused is used as it is.
        """
        if not engine.composable:
            return
        if engine.method.fit is None and not self._warned:
            self._warned = True
            name = engine.method.name
            log.warning(
                "%s, the engine's method, takes no fused variants; auto, fusionrag and %s:fused=True do", name, name
            )
        with self._lock:
            try:
                unwanted = set(map(canonical, without))
                self._take_in([text for text in engine.index.texts() if text not in unwanted], vectors or {})
                changed = self._neighbourhood.changed()
            except Exception:
                log.exception("chunks not fused: no neighbours")
                return
            bar = tqdm(total=len(changed), desc="fused chunks", unit="chunk", delay=1, disable=not show_progress)

            def progress(done: int) -> None:
                bar.update(done - bar.n)

            with bar:
                result = engine.fuse(changed, progress)
            done = set(result.keys)  # what failed, or was interrupted, is tried again the next time
            library = engine.library_of(engine.method)
            self._neighbourhood.settled({t: others for t, others in changed.items() if library.key(t) in done})
        if result.skipped:
            text, reason = result.skipped[0]
            log.warning("%d chunks not fused; the first, %r: %s", len(result.skipped), text, reason)

    def follow(self, engine: Engine) -> None:
        """Note which chunks the engine has forgotten. Called before they may come back: what was fused with them is
        gone and must be fused again.
        """
        if engine.composable:
            with self._lock:
                self._neighbourhood.remove(set(self._neighbourhood) - set(engine.index.texts()))

    def _take_in(self, texts: Sequence[str], vectors: Mapping[str, Any]) -> None:
        self._neighbourhood.remove(set(self._neighbourhood) - set(texts))
        new = [text for text in texts if text not in self._neighbourhood]
        if given := [text for text in new if text in vectors]:
            self._neighbourhood.add(*_finite(given, [vectors[text] for text in given]))
        rest = [text for text in new if text not in vectors]
        for start in range(0, len(rest), _BATCH):
            self._neighbourhood.add(*self._embedded(rest[start : start + _BATCH]))

    def _embedded(self, texts: Sequence[str]) -> tuple[list[str], Any]:
        """The texts that have an embedding of finite numbers, and these: one that has none does not keep the rest."""
        try:
            return _finite(texts, self._embed(list(texts)))
        except Exception as error:
            failure = error
        good: list[str] = []
        vectors: list[Any] = []
        failed = 0
        for text in texts if len(texts) > 1 else ():  # it may have failed for one of them
            try:
                vectors += list(self._embed([text]))
                good.append(text)
            except Exception as error:
                failure, failed = error, failed + 1
                if failed == _PATIENCE and not good:
                    break
        log.error("%d chunks have no neighbours and are not fused: %s", len(texts) - len(good), failure)
        return _finite(good, vectors) if good else ([], np.zeros((0, 1), dtype=np.float32))


def _finite(texts: Sequence[str], given: Any) -> tuple[list[str], Any]:
    vectors = np.asarray(given, dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        return list(texts), vectors  # the neighbourhood says what is wrong
    finite = [row for row, vector in enumerate(vectors) if np.isfinite(vector).all()]
    for row in set(range(len(texts))).difference(finite):
        log.warning("not fused: %.60r: its embedding is not made of finite numbers", texts[row])
    return [texts[row] for row in finite], vectors[finite]
