"""Fused variants: a chunk's KV computed again, behind chunks that it is likely to follow in a prompt."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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
"""Numbers of prompts with a chunk after which it is fused in idle time: its expected context grows more reliable."""

_VARIANTS = 3
"""Variants kept per chunk, of those that are made in idle time."""

_WAITING = 256
"""Tasks that wait, above which no more prompts are noted for idle time."""

_NEIGHBOURS = 10
"""The length of a context in idle time, in chunks."""


class Fusing:
    """Computes fused variants of the chunks of a `Corpus`. Thread-safe. Source: FusionRAG (arXiv 2601.12904)."""

    def __init__(self, corpus: Corpus, usage: Usage, lock: FairLock) -> None:
        self._corpus, self._collections, self._index = corpus, corpus.collections, corpus.index
        self._usage, self._lock = usage, lock
        later = weakref.WeakMethod(self._fuse_later)  # a reference cycle would keep both alive after their engine
        corpus.fuse_later = lambda task: (fuse := later()) and fuse(task)

    @on_cpu
    def fuse(
        self,
        neighbours: Mapping[str, Sequence[str]],
        method: Method,
        progress: Callable[[int], None] | None = None,
        variants: int = 3,
    ) -> Ensured:
        """Store a variant of each of these chunks, computed behind its neighbours (see `Engine.fuse`)."""
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
        """Store the KV that these chunks have in a prompt of this order (see `Engine.fuse_in_order`)."""
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

    def used_together(self, names: Sequence[str], method: Method) -> None:
        """Queue what a prompt with these chunks, by their names in the index, is worth in idle time: the chunks in this
        order, from its first use on, and frequent chunks with those most likely to precede them.
        """
        due = [self._index.text(name) for name in names if self._usage.uses(name) in FUSED_AT]
        tasks = [Task(text, method, fuse=True) for text in due if text is not None]
        sequence = tuple(dict.fromkeys(names))
        if len(sequence) > 1 and self._corpus.background.waiting < _WAITING:
            tasks.append(Task("", method, sequence=sequence))
        self._corpus.background.add(tasks)

    def contexts(self, least: int = 2, count: int = 10) -> dict[str, list[str]]:
        """The chunks of at least ``least`` prompts, each with the ``count`` chunks most likely to precede it."""
        neighbours = {}
        for name, others in self._usage.expected_contexts(self._usage.hot(least), count).items():
            texts = [self._index.text(other) for other in (name, *others)]
            if texts[0] is not None and (context := [text for text in texts[1:] if text is not None]):
                neighbours[texts[0]] = context
        return neighbours

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _fuse_later(self, task: Task) -> None:
        if task.sequence:
            self._fuse_sequence(task)
            return
        names = self._usage.expected_context(self._collections.name(task.text), _NEIGHBOURS)
        texts = [text for name in names if (text := self._index.text(name)) is not None]
        self.fuse({task.text: texts}, task.method, variants=_VARIANTS)

    def _fuse_sequence(self, task: Task) -> None:
        """Fuse a prompt's chunks in its order, into spare room, one chunk at a time between requests.

        Where there is always a request, or one of the chunks is forgotten meanwhile, it ends; a later prompt with these
        chunks goes on where it was.
        """
        variants, result = self._collections.of(task.method.encode).variants, Ensured()
        pieces: Iterator[bool] | None = None
        while not result.skipped and self._corpus.rests():
            with self._corpus.skipping([""], result, "not fused in order"), self._lock:
                self._corpus.follow()
                texts = [text for name in task.sequence if (text := self._index.text(name)) is not None]
                known = self._known(texts, self._collections.of(task.method.encode))
                if len(known) < len(task.sequence) or not self._corpus.background.wanted():
                    return
                pieces = pieces or variants.in_order(known, _VARIANTS, spare=True)
                if next(pieces, None) is None:
                    return

    def _fuse(
        self, neighbours: Mapping[str, Sequence[str]], collection: Collection, keep: int, result: Ensured
    ) -> None:
        with self._lock:  # no chunk of the contexts can be forgotten while it is held
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
        """Those of ``texts`` that are in the index and have KV: another process may have deleted it."""
        libraries = (self._collections.main, collection.library)
        return [
            text
            for text in texts
            if self._collections.name(text) in self._index and any(text in library for library in libraries)
        ]

    def _obstacle(self, method: Method, variants: int) -> str | None:
        """Why no chunk can be fused for this method, or None. Raises `ConfigurationError` for ``variants`` below 1."""
        at_least(1, variants=variants)
        obstacle: str | None = self._collections.backbone.obstacle
        return obstacle or (None if method.ahead else f"{method.name} encodes nothing ahead")


def _checked(neighbours: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """``neighbours`` as lists. Raises `ConfigurationError` unless it maps texts to lists of texts."""
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
    """The characters that a chunk counts for in a batch that is fused. Its context is not computed, but takes memory:
    with ten neighbours ten times the chunk's own.
    """
    return len(text) + sum(map(len, context)) // 8
