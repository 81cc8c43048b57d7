"""Chunks behind other chunks: their KV computed behind others, and kept beside what they are by themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from .. import methods
from ..background import Background
from ..chunks import canonical
from ..errors import CacheClipError, ConfigurationError
from ..kv.collections import Encodings
from ..kv.library import Library
from ..kv.prefix_caching import PrefixCache, PrefixCaching
from ..methods import Method
from ..model.backbone import Backbone
from ..prefill.compose import Reuse
from ..prompt import ChunkIndex
from ..serving.lock import FairLock
from ..spec import at_least
from .batches import batch_characters, batches, with_progress
from .usage import Usage

log = logging.getLogger("cacheclip_rag")

T = TypeVar("T")

_UNKNOWN = "the chunk is not known: ensure it first"
_UNKNOWN_COMPANY = "none of its neighbours is known: ensure them first"

FUSED_AT = (2, 8, 32, 128, 512, 2048)
"""How often a chunk must have come in prompts to be fused in idle time, and then again: its context becomes clearer."""


class Task(NamedTuple):
    """What is done when no request is being served: encode a chunk, or fuse it with those it was met with."""

    text: str
    method: Method | None = None
    fuse: bool = False


@dataclass
class Ensured:
    """What `Engine.ensure` did: keys of chunks whose KV is kept, how many were encoded now, what was left out."""

    keys: list[str] = field(default_factory=list)
    encoded: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """``(beginning of the text, reason)`` of chunks without KV; prompts with them are prefilled as usual."""


class Fusing:
    """The part of an `Engine` that fuses chunks."""

    backbone: Backbone
    composable: bool
    method: Method
    library: Library
    index: ChunkIndex
    usage: Usage
    _encodings: Encodings
    _exact: dict[PrefixCaching, PrefixCache]
    _prefix: str | None
    lock: FairLock
    _background: Background[Task]

    def recipe(self, method: str | Method | None = None) -> Method:
        """What a request that names this method is served by; None is the engine's own. Chunks stand behind the
        engine's ``prefix``, if it was given one, unless the method names another. Raises `ConfigurationError`.
        """
        return self.method if method is None else methods.with_prefix(method, self._prefix)

    def fuse(
        self,
        neighbours: Mapping[str, Sequence[str]],
        progress: Callable[[int], None] | None = None,
        *,
        method: str | Method | None = None,
        variants: int = 3,
    ) -> Ensured:
        """Keep another KV of these chunks: each computed behind its neighbours, the chunks it is likely to meet.

        ``neighbours``: texts by text, the nearest first, as `fusion.similar` finds them. Chunks and neighbours that
        `ensure` was not asked for are left out, so that fusing brings back nothing that was forgotten. What is there is
        not computed again: stop it whenever you like and call it again, after adding documents, too. Of more than so
        many ``variants`` of a chunk the oldest are dropped. ``method`` says how chunks are encoded. Never raises for a
        chunk. Raises `ConfigurationError` for what is no mapping from texts to several texts.
        """
        result = Ensured()
        neighbours = _companies(neighbours)
        chosen = self.recipe(method)
        reason = self._unfusable(chosen, variants)
        groups = batches(
            neighbours, batch_characters(self.backbone.device), lambda text: _weight(text, neighbours[text])
        )
        for batch in with_progress(groups, progress):
            try:
                if reason is not None:
                    result.skipped += [(text[:40], reason) for text in batch]
                else:
                    self._fuse(
                        {text: neighbours[text] for text in batch},
                        self._encodings.reuse(chosen.encode),
                        variants,
                        result,
                    )
            except (CacheClipError, RuntimeError, MemoryError, OSError) as error:
                log.warning("%d chunks not fused: %s", len(batch), error)
                result.skipped += [(text[:40], str(error)) for text in batch]
        return result

    def fuse_in_order(
        self,
        sequences: Iterable[Sequence[str]],
        progress: Callable[[int], None] | None = None,
        *,
        method: str | Method | None = None,
        variants: int = 3,
    ) -> Ensured:
        """Keep the KV that prompts of these chunks, in this order, would leave: each chunk behind all those before it.

        A prompt that holds such a sequence again is answered as full prefill answers it, up to the text between chunks;
        one that holds most of it, nearly so. Each sequence costs what prefilling it costs. The rest is as in `fuse`.
        """
        result = Ensured()
        chosen = self.recipe(method)
        reason = self._unfusable(chosen, variants)
        for done, texts in enumerate(map(list, map(require_list, require_list(sequences))), start=1):
            try:
                if reason is not None:
                    result.skipped += [(text[:40], reason) for text in texts]
                else:
                    self._fuse_in_order(texts, self._encodings.reuse(chosen.encode), variants, result)
            except (CacheClipError, RuntimeError, MemoryError, OSError) as error:
                log.warning("sequence not fused: %s", error)
                result.skipped += [(text[:40], str(error)) for text in texts]
            if progress is not None:
                progress(done)
        return result

    def fuse_used(
        self, least: int = 2, count: int = 10, progress: Callable[[int], None] | None = None, **options: Any
    ) -> Ensured:
        """Fuse the chunks that came in ``least`` prompts or more, each with the ``count`` others that will stand in
        front of it most often (`Usage.context`). ``options`` are those of `fuse`, and so is the rest.
        """
        return self.fuse(self.context(least, count), progress, **options)

    def context(self, least: int = 2, count: int = 10) -> dict[str, list[str]]:
        """What `fuse_used` fuses: chunks that came in ``least`` prompts or more, and whom each met, for `fuse`."""
        neighbours = {}
        for name, others in self.usage.expected_contexts(self.usage.hot(least), count).items():
            texts = [self.index.text(other) for other in (name, *others)]
            if texts[0] is not None and (context := [text for text in texts[1:] if text is not None]):
                neighbours[texts[0]] = context
        return neighbours

    def fused(self, text: str, method: str | Method | None = None) -> list[tuple[str, ...]]:
        """In whose context the kept KV of this chunk was computed, besides that of the chunk by itself: the texts that
        stood in front of it, a tuple for each variant. ``method`` says how chunks are encoded.
        """
        return self._encodings.reuse(self.recipe(method).encode).fused.held(text) if self.composable else []

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Take note of what other processes did. What they forgot must not be found, nor encoded again, here."""
        if lost := set(self._encodings.follow()):
            self._exact.clear()
            self._background.drop(lambda task: canonical(task.text) in lost)

    def _fuse(self, neighbours: Mapping[str, Sequence[str]], reuse: Reuse, keep: int, result: Ensured) -> None:
        with self.lock:  # nothing of the contexts can be forgotten meanwhile
            self._follow()
            known = {t: self._known(context, reuse) for t, context in neighbours.items() if self._known([t], reuse)}
            result.skipped += [(text[:40], _UNKNOWN) for text in neighbours if text not in known]
            for text, done in zip(known, reuse.fused.fuse(known, keep), strict=True):
                if neighbours[text] and not known[text]:
                    result.skipped.append((text[:40], _UNKNOWN_COMPANY))
                elif isinstance(done, Exception):
                    log.warning("chunk not fused: %s", done)
                    result.skipped.append((text[:40], str(done)))
                else:
                    result.encoded += done
                    result.keys.append(reuse.library.key(text))

    def _fuse_in_order(self, texts: Sequence[str], reuse: Reuse, keep: int, result: Ensured) -> None:
        with self.lock:
            self._follow()
            known = self._known(texts, reuse)
            result.skipped += [(text[:40], _UNKNOWN) for text in texts if text not in known]
            result.encoded += reuse.fused.fuse_in_order(known, keep)
            result.keys += [reuse.library.key(text) for text in known]

    def _known(self, texts: Iterable[str], reuse: Reuse) -> list[str]:
        """Those that are recognised and have KV: another process may have forgotten what this one knows."""
        libraries = (self.library, reuse.library)
        return [
            text
            for text in texts
            if self.library.key(text) in self.index and any(text in library for library in libraries)
        ]

    def _unfusable(self, method: Method, variants: int) -> str | None:
        """Why no chunk can be fused for this method, or None. Raises `ConfigurationError` for no variants at all."""
        at_least(1, variants=variants)
        return self.backbone.obstacle or (None if method.ahead else f"{method.name} encodes nothing ahead")


def require_list(texts: Iterable[T]) -> Iterable[T]:
    """These; raises `ConfigurationError` for one text, whose characters would be taken for texts."""
    if isinstance(texts, str):
        raise ConfigurationError("chunks are given as several texts, not as one: [text]")
    return texts


def _companies(neighbours: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """These; raises `ConfigurationError` for what is no mapping, or whose contexts are no texts."""
    if not isinstance(neighbours, Mapping):
        raise ConfigurationError(
            "neighbours are given by chunk, {text: [neighbour, ...]}, as fusion.similar finds them, not as "
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
