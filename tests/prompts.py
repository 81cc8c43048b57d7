"""Texts, indices and what holds for every recognition, for the tests of prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cacheclip_rag.chunks import MIN_CHARS
from cacheclip_rag.prompt import (
    ChunkIndex,
    Span,
)

WORDS = ["stone", "river", "lamp", "amber", "copper", "engine", "olive", "1847", "harbour", "pencil", "Otto", "3.14"]

CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def words(seed: int, count: int = 60) -> str:
    """Prose-like text that no other seed repeats for long."""
    rng = random.Random(seed)
    return " ".join(f"{rng.choice(WORDS)}{rng.randrange(1000)}" for _ in range(count))


def index_of(texts: Sequence[str]) -> ChunkIndex:
    index = ChunkIndex()
    for number, text in enumerate(texts):
        index.add(f"k{number}", text)
    return index


def check(prompt: str, spans: Sequence[Span], index: ChunkIndex) -> None:
    """What holds for every answer of `ChunkIndex.find`: disjoint, in order, long enough, and true."""
    last, rebuilt = 0, ""
    for span in spans:
        assert last <= span.start < span.end <= len(prompt)
        assert len(span) == span.end - span.start >= MIN_CHARS
        text = index.text(span.key)
        assert text is not None
        assert span.offset >= 0 and span.offset + len(span) <= len(text)
        rebuilt += prompt[last : span.start] + text[span.offset : span.offset + len(span)]
        last = span.end
    assert rebuilt + prompt[last:] == prompt


def whole(spans: Sequence[Span], index: ChunkIndex) -> list[str]:
    """The keys of the spans that hold all of their chunk."""
    return [span.key for span in spans if len(span) == len(index.text(span.key) or "")]
