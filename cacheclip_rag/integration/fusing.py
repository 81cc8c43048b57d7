"""Fusing the chunks of a growing collection with those they resemble."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from ..engine import Engine

log = logging.getLogger("cacheclip_rag")

_BATCH = 256


class Fuser:
    """Keeps every chunk that an engine knows fused with the ``count`` others most like it.

    ``embed``: a function of texts that gives their embeddings; it is asked for each text once, for those too that were
    ingested by earlier processes. Thread-safe.
    """

    def __init__(self, count: int, embed: Callable[[list[str]], Any]) -> None:
        """Raises ConfigurationError for fewer than one."""
        from ..fusion import Neighbourhood

        self._neighbourhood = Neighbourhood(count)
        self._embed = embed
        self._lock = threading.Lock()

    def __call__(self, engine: Engine, show_progress: bool = True) -> None:
        """Fuse what is new and what has got new neighbours, with a progress bar once it takes over a second.

        Never raises: a chunk that is not fused is used as it is.
        """
        if not engine.composable:
            return
        with self._lock:
            try:
                self._follow(engine)
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
        for text, reason in result.skipped:
            log.debug("not fused: %r: %s", text, reason)

    def _follow(self, engine: Engine) -> None:
        texts = [text for text in map(engine.index.text, engine.index.keys()) if text is not None]
        self._neighbourhood.remove(set(self._neighbourhood) - set(texts))
        new: Sequence[str] = [text for text in texts if text not in self._neighbourhood]
        for start in range(0, len(new), _BATCH):
            self._neighbourhood.add(*self._embedded(new[start : start + _BATCH]))

    def _embedded(self, texts: Sequence[str]) -> tuple[list[str], Any]:
        """The texts that have an embedding of finite numbers, and these: one that has none does not keep the rest."""
        vectors = np.asarray(self._embed(list(texts)), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            return list(texts), vectors  # the neighbourhood says what is wrong
        finite = [row for row, vector in enumerate(vectors) if np.isfinite(vector).all()]
        for row in set(range(len(texts))).difference(finite):
            log.warning("not fused: %.60r: its embedding is not made of finite numbers", texts[row])
        return [texts[row] for row in finite], vectors[finite]
