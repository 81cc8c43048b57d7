"""The numbers of one request: tokens by source, times by stage, chunks and fallbacks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..deprecation import renamed_attribute, renamed_parameters
from .token_sources import TokenSources


@renamed_parameters(exact="in_place")
@dataclass(frozen=True)
class ChunkUse:
    """One known chunk in the prompt: its characters ``[start, end)``, and its tokens by their source.

    ``key``: its name in the index; ``whole``: whether the prompt contains all of the stored chunk; ``in_place``:
    whether it was right behind the prefix it was encoded behind, so that its KV needed no repair.
    """

    key: str
    start: int
    end: int
    reused: int
    recomputed: int
    computed: int
    whole: bool
    in_place: bool
    missing: str | None = None
    """Why its KV was not used, or None."""

    exact = renamed_attribute("exact", "in_place")


@dataclass
class Record:
    """The numbers of one request; `Report` documents and shows them."""

    method: str
    requested_ratio: float
    prompt_tokens: int = 0
    prefix: int = 0
    reused: int = 0
    recomputed: int = 0
    fresh: int = 0
    adjusted: int = 0
    """Reused tokens whose KV was adjusted by the change of recomputed tokens of their chunk (`recompute.carry`)."""
    edges: int = 0
    """Fresh tokens inside known chunks."""
    soft_tokens: int = 0
    """Trained vectors on the canvas beside the prompt's tokens (`prompt.SoftTokens`): they have no text, and are in no
    other count."""
    completion_tokens: int = 0
    drafted: int = 0
    """Tokens that prompt lookup proposed for the answer (`serving.lookup`)."""
    looked_up: int = 0
    """Tokens of the answer that came so, without a forward of their own."""
    fit: float | None = None
    """How well the chunks' contexts fit the prompt (`kv.fit.context_fit`), 0..1; None if the ratio is fixed."""
    chunks: list[ChunkUse] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    """The reasons why reuse was given up, for the request or for a chunk; empty if it was not."""
    seconds: dict[str, float] = field(default_factory=dict)
    ttft: float = 0.0
    """Seconds from the call to the first token's id, including all stages and waiting."""
    total: float = 0.0
    finish_reason: str = ""
    canvas_bytes: int = 0
    token_sources: TokenSources | None = field(default=None, repr=False, compare=False)
    """The source of each token, and the prompt, for display. Not part of `as_dict`, logs, rows or responses."""
    sources: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Display names of chunks by key, such as file names; callers fill it. Other chunks show their first words."""
    full_prefill: float | None = field(default=None, compare=False)
    """Seconds to the first token of a full prefill of this prompt, if it was measured."""

    fates = renamed_attribute("fates", "token_sources")

    @property
    def ratio(self) -> float:
        return self.recomputed / max(1, self.reused + self.recomputed)

    @property
    def computed_tokens(self) -> int:
        """Prompt rows that went through the model."""
        return self.recomputed + self.fresh

    @property
    def bound(self) -> float:
        """The upper bound of the speedup over a full prefill: prompt tokens / computed tokens."""
        return self.prompt_tokens / max(1, self.computed_tokens)

    @property
    def cached_tokens(self) -> int:
        """Tokens read from cache and not recomputed: the cache reads in usage numbers."""
        return self.prefix + self.reused

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts under OpenAI's names, which frameworks and tracing tools read."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def as_dict(self) -> dict[str, Any]:
        """All numbers, JSON-ready, including derived ones; no text of the prompt."""
        kept = {
            one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("token_sources", "sources")
        }
        return {
            **kept,
            "chunks": [asdict(use) for use in self.chunks],
            "fallbacks": list(self.fallbacks),
            "seconds": dict(self.seconds),
            "ratio": self.ratio,
            "bound": self.bound,
            "cached_tokens": self.cached_tokens,
        }

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of the block to ``seconds[stage]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    @property
    def nothing_known(self) -> str:
        """Why no chunk was found in the prompt; empty if one was, or if there is another reason."""
        used = self.chunks or self.reused or self.prefix > self.fresh
        if used or self.fallbacks or self.requested_ratio >= 1:
            return ""
        return "no chunk in this prompt has stored KV: it was not ingested, or its text was changed on the way"

    @property
    def line(self) -> str:
        """The request in one line, for logs."""
        return " ".join(str(self).replace("\n  ", "; ").split())

    def __str__(self) -> str:
        text = (
            f"{self.method}: {self.cached_tokens:,} of {self.prompt_tokens:,} prompt tokens from cache, "
            f"{self.recomputed:,} recomputed ({self.ratio:.0%} of {self.reused + self.recomputed:,}), "
            f"{self.fresh:,} fresh"
        )
        if self.ttft:  # vLLM's server does not tell
            text += f"; first token after {self.ttft:.2f} s"
        if self.seconds:
            text += " (" + ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items() if v >= 0.005) + ")"
        if self.soft_tokens:
            text += f"; {self.soft_tokens:,} soft tokens beside the text"
        if self.looked_up:
            text += f"; {self.looked_up:,} of {self.completion_tokens:,} tokens by prompt lookup"
        for reason in self.fallbacks:
            text += f"\n  fell back: {reason}"
        if reason := self.nothing_known:
            text += f"\n  nothing reused: {reason}"
        return text
