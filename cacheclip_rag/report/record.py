"""What happened in one request, in numbers."""

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
    """One known chunk in the prompt: characters ``[start, end)``, and its tokens by what became of them.

    ``whole`` says whether all of the stored chunk stood there; ``in_place`` whether it stood right behind the prefix it
    was encoded behind, so that its KV needed no repair.
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
    """The numbers of one request; `Report` says what they mean, and shows them."""

    method: str
    requested_ratio: float
    prompt_tokens: int = 0
    prefix: int = 0
    reused: int = 0
    recomputed: int = 0
    fresh: int = 0
    adjusted: int = 0
    """Of the reused tokens, those whose KV was moved by what recomputing changed in others (`recompute.carry`)."""
    edges: int = 0
    """Fresh tokens inside known chunks."""
    completion_tokens: int = 0
    fit: float | None = None
    """How well the placed chunk KV fits what stands in front of it, 0..1, where the ratio depends on it."""
    chunks: list[ChunkUse] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    """Why reuse was given up, wholly or for a chunk; empty when all went well."""
    seconds: dict[str, float] = field(default_factory=dict)
    ttft: float = 0.0
    """Seconds from the call to the first token's id, everything included."""
    total: float = 0.0
    finish_reason: str = ""
    canvas_bytes: int = 0
    token_sources: TokenSources | None = field(default=None, repr=False, compare=False)
    """What became of each token, and the prompt: for showing. Not part of `as_dict`, so of no log, row or response."""
    sources: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """What people call the chunks, by key: to be filled by who knows. Chunks without are shown by how they begin."""
    full_prefill: float | None = field(default=None, compare=False)
    """Seconds to the first token of a full prefill of this prompt, where somebody measured it."""

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
        """How many times faster than a full prefill the rows alone allow: prompt tokens / computed tokens."""
        return self.prompt_tokens / max(1, self.computed_tokens)

    @property
    def cached_tokens(self) -> int:
        """Tokens read from cache and not recomputed; what usage numbers call cache reads."""
        return self.prefix + self.reused

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts under the names that frameworks and tracing tools read."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, derived numbers included; no text of the prompt."""
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
    def line(self) -> str:
        """The request in one line, for logs."""
        return " ".join(str(self).replace("\n  ", "; ").split())

    def __str__(self) -> str:
        from .summary import nothing_known

        text = (
            f"{self.method}: {self.cached_tokens:,} of {self.prompt_tokens:,} prompt tokens from cache, "
            f"{self.recomputed:,} recomputed ({self.ratio:.0%} of {self.reused + self.recomputed:,}), "
            f"{self.fresh:,} fresh; first token after {self.ttft:.2f} s"
        )
        if self.seconds:
            text += " (" + ", ".join(f"{k} {v:.2f}" for k, v in self.seconds.items() if v >= 0.005) + ")"
        for reason in self.fallbacks:
            text += f"\n  fell back: {reason}"
        if reason := nothing_known(self):
            text += f"\n  nothing reused: {reason}"
        return text
