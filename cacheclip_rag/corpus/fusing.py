"""Chunks behind others: their KV computed once more, behind chunks they are likely to follow in a prompt."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..compute import on_cpu
from ..errors import ConfigurationError
from ..kv.collections import Collection
from ..methods import Method
from ..serving.lock import FairLock
from ..spec import at_least
from .batches import batch_characters, batches, with_progress
from .corpus import Corpus, Ensured, Task, require_list
from .usage import Usage

log = logging.getLogger("cacheclip_rag")

_UNKNOWN = "the chunk is not known: ensure it first"
_UNKNOWN_CONTEXT = "none of its neighbours is known: ensure them first"

FUSED_AT = (2, 8, 32, 128, 512, 2048)
"""How often a chunk must have come in prompts to be fused in idle time, and then again: its context becomes clearer."""

_NEIGHBOURS = 10
"""Chunks that one is fused behind in idle time."""


class Fusing:
    """Fuses the chunks of a `Corpus`. Thread-safe."""

    def __init__(self, corpus: Corpus, usage: Usage, lock: FairLock) -> None:
        self._corpus, self._collections, self._index = corpus, corpus.collections, corpus.index
        self._usage, self._lock = usage, lock
        hot = weakref.WeakMethod(self.fuse_hot)  # in a circle, both would outlive their engine
        corpus.fuse_later = lambda task: (fuse := hot()) and fuse(task)

    @on_cpu
    def fuse(
        self,
        neighbours: Mapping[str, Sequence[str]],
        method: Method,
        progress: Callable[[int], None] | None = None,
        variants: int = 3,
    ) -> Ensured:
        """Keep another KV of these chunks, each computed behind its neighbours (see `Engine.fuse`)."""
        result, neighbours = Ensured(), _checked(neighbours)
        reason = self._obstacle(method, variants)
        characters = batch_characters(self._collections.backbone.device)
        for batch in with_progress(batches(neighbours, characters, lambda t: _weight(t, neighbours[t])), progress):
            if reason is not None:
                result.skip(batch, reason)
                continue
            with self._corpus.skipping(batch, result, "not fused"):
                wanted = {text: neighbours[text] for text in batch}
                self._fuse(wanted, self._collections.of(method.encode), variants, result)
        return result

    @on_cpu
    def fuse_in_order(
        self,
        sequences: Iterable[Sequence[str]],
        method: Method,
        progress: Callable[[int], None] | None = None,
        variants: int = 3,
    ) -> Ensured:
        """Keep the KV that prompts of these chunks, in this order, would leave (see `Engine.fuse_in_order`)."""
        result = Ensured()
        reason = self._obstacle(method, variants)
        for done, texts in enumerate(map(list, map(require_list, require_list(sequences))), start=1):
            if reason is not None:
                result.skip(texts, reason)
            else:
                with self._corpus.skipping(texts, result, "not fused in order"):
                    self._fuse_in_order(texts, self._collections.of(method.encode), variants, result)
            if progress is not None:
                progress(done)
        return result

    def fuse_hot(self, task: Task) -> None:
        """Fuse a chunk with those it is expected behind."""
        names = self._usage.expected_context(self._collections.name(task.text), _NEIGHBOURS)
        texts = [text for name in names if (text := self._index.text(name)) is not None]
        self.fuse({task.text: texts}, task.method)

    def contexts(self, least: int = 2, count: int = 10) -> dict[str, list[str]]:
        """The chunks that came in ``least`` prompts or more, each with the ``count`` it is expected behind."""
        neighbours = {}
        for name, others in self._usage.expected_contexts(self._usage.hot(least), count).items():
            texts = [self._index.text(other) for other in (name, *others)]
            if texts[0] is not None and (context := [text for text in texts[1:] if text is not None]):
                neighbours[texts[0]] = context
        return neighbours

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _fuse(
        self, neighbours: Mapping[str, Sequence[str]], collection: Collection, keep: int, result: Ensured
    ) -> None:
        with self._lock:  # nothing of the contexts can be forgotten meanwhile
            self._corpus.follow()
            known = {
                text: self._known(context, collection)
                for text, context in neighbours.items()
                if self._known([text], collection)
            }
            result.skip((text for text in neighbours if text not in known), _UNKNOWN)
            for text, done in zip(known, collection.variants.fuse(known, keep), strict=True):
                if neighbours[text] and not known[text]:
                    result.skip([text], _UNKNOWN_CONTEXT)
                elif isinstance(done, Exception):
                    log.warning("chunk not fused: %s", done)
                    result.skip([text], str(done))
                else:
                    result.encoded += done
                    result.keys.append(collection.library.key(text))

    def _fuse_in_order(self, texts: Sequence[str], collection: Collection, keep: int, result: Ensured) -> None:
        with self._lock:
            self._corpus.follow()
            known = self._known(texts, collection)
            result.skip((text for text in texts if text not in known), _UNKNOWN)
            result.encoded += collection.variants.fuse_in_order(known, keep)
            result.keys += [collection.library.key(text) for text in known]

    def _known(self, texts: Iterable[str], collection: Collection) -> list[str]:
        """Those that are recognised and have KV: another process may have forgotten what this one knows."""
        libraries = (self._collections.main, collection.library)
        return [
            text
            for text in texts
            if self._collections.name(text) in self._index and any(text in library for library in libraries)
        ]

    def _obstacle(self, method: Method, variants: int) -> str | None:
        """Why no chunk can be fused for this method, or None. Raises `ConfigurationError` for no variants at all."""
        at_least(1, variants=variants)
        obstacle: str | None = self._collections.backbone.obstacle
        return obstacle or (None if method.ahead else f"{method.name} encodes nothing ahead")


def _checked(neighbours: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """These; raises `ConfigurationError` for what is no mapping, or whose values are no lists of texts."""
    if not isinstance(neighbours, Mapping):
        raise ConfigurationError(
            "neighbours are given by chunk, {text: [neighbour, ...]}, as corpus.neighbours.similar finds them, not as "
            f"{type(neighbours).__name__}"
        )
    for text, context in neighbours.items():
        if isinstance(context, str) or not isinstance(context, Iterable):
            raise ConfigurationError(f"the neighbours of {text[:40]!r} are several texts, [text], not {context!r:.60}")
    return {text: list(context) for text, context in neighbours.items()}


def _weight(text: str, context: Sequence[str]) -> int:
    """Characters that a chunk counts for where it is fused together with others. Its context is not computed and takes
    memory only, but for ten neighbours ten times its own.
    """
    return len(text) + sum(map(len, context)) // 8
