"""Rules for choosing among a chunk's fused variants by the chunks that precede it in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..chunks import ChunkKV
from .encode import disorder

Context = tuple[str, ...]
"""The texts of the chunks that a variant was computed behind, in order; empty for a chunk encoded in isolation."""


class Fit(Protocol):
    """A rule that chooses a variant. Frozen dataclasses."""

    def choose(self, contexts: Sequence[Context], before: Sequence[str]) -> Context:
        """The one of ``contexts`` to use for a chunk preceded by the chunks ``before``."""


@dataclass(frozen=True)
class Nearest:
    """The variant with the largest `context_overlap` with the preceding chunks; of equal ones a fused one, then the
    newest.
    """

    def choose(self, contexts: Sequence[Context], before: Sequence[str]) -> Context:
        order = range(len(contexts))
        return contexts[max(order, key=lambda n: (context_overlap(contexts[n], before), bool(contexts[n]), n))]


@dataclass(frozen=True)
class Ordered:
    """`Nearest` by `context_overlap` times ``1 - gamma``, gamma the share of chunk pairs in reverse order.

    Cache-Craft's choice among harvested variants (arXiv 2502.15734, section 3.3), if every chunk attends equally to
    all others.
    """

    def choose(self, contexts: Sequence[Context], before: Sequence[str]) -> Context:
        scores = [context_overlap(context, before) * (1.0 - disorder(context, before)) for context in contexts]
        return contexts[max(range(len(contexts)), key=lambda n: (scores[n], bool(contexts[n]), n))]


@dataclass(frozen=True)
class LongestPath:
    """FusionRAG's Alternative Path: the variant whose context is the longest suffix of the preceding chunks, in their
    order; without one, the chunk encoded in isolation.

    Source: FusionRAG (arXiv 2601.12904), sections 4 and 5.3.3.
    """

    def choose(self, contexts: Sequence[Context], before: Sequence[str]) -> Context:
        known = set(contexts)
        return next((path for start in range(len(before)) if (path := tuple(before[start:])) in known), ())


def prompt_fit(chunks: Sequence[ChunkKV | None], texts: Sequence[str], tokens: Tensor) -> float:
    """The mean `context_fit` of a prompt's ``chunks`` (None for one without KV, which counts 0), each weighted by its
    ``tokens [n]`` (integers); ``texts`` are their canonical texts, in the prompt's order. 0 without tokens.
    """
    fits = [0.0 if chunk is None else context_fit(chunk.context, texts[:number]) for number, chunk in enumerate(chunks)]
    total = int(tokens.sum())
    return float((torch.tensor(fits, dtype=torch.float32) * tokens).sum() / total) if total else 0.0


def context_fit(context: Sequence[str], before: Sequence[str]) -> float:
    """How well a variant's context fits the chunks ``before`` that it is placed behind, 0..1.

    0 for a chunk encoded in isolation that other chunks precede. A fused variant has at least 1/2, because any context
    removes most of the error of an isolated chunk (docs/log.md); the rest grows with `context_overlap`.
    """
    return (bool(context) + context_overlap(context, before)) / 2 if context or before else 1.0


def context_overlap(context: Sequence[str], before: Sequence[str]) -> float:
    """The Jaccard overlap ``|K and B| / |K or B|`` of a variant's context K and the preceding chunks B; 1 if both are
    empty.
    """
    seen, there = set(context), set(before)
    return len(seen & there) / len(seen | there) if seen or there else 1.0
