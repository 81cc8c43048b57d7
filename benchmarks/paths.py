"""A simulation of FusionRAG's Alternative Path against a prefix cache: storage, repeated computation, hits.

    python benchmarks/paths.py

The paper (arXiv 2601.12904, 5.3.3) reports: 1,000 queries; 60 % of chunks from the knowledge base, 30 % new but shared
among users, 10 % unique; storage -71 %, 82.3 % of the repeated computations of chunks removed, 77.9 % hits. It gives
neither the number of chunks per query nor their popularity; the rows below vary both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from cacheclip_rag.errors import ConfigurationError

Path = tuple[str, ...]
"""The chunks that a copy was computed behind, and the chunk itself."""


@dataclass(frozen=True)
class Workload:
    """Queries as in FusionRAG's simulation; ``chunks_each`` and ``skew``, which the paper does not give, are ours.

    Each of ``queries`` retrieves ``chunks_each`` chunks: the share ``known`` from the ``base`` chunks of the knowledge
    base, the share ``shared`` from ``pool`` chunks that several users upload, and the rest are unique. Chunks of the
    first two kinds are drawn by Zipf's law with exponent ``skew``.
    """

    queries: int = 1000
    chunks_each: int = 10
    known: float = 0.6
    shared: float = 0.3
    base: int = 1000
    pool: int = 500
    skew: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.queries, self.chunks_each, self.base, self.pool) < 1:
            raise ConfigurationError("queries, chunks_each, base and pool must be at least 1")
        if min(self.known, self.shared, 1 - self.known - self.shared) < 0:
            raise ConfigurationError("known and shared are shares: at least 0, and 1 at most together")

    def __iter__(self) -> Iterator[list[str]]:
        """The chunks of each query, in order, without repetition."""
        draw = random.Random(self.seed)
        weights = {kind: _zipf(size, self.skew) for kind, size in (("base", self.base), ("pool", self.pool))}
        for query in range(self.queries):
            chunks: dict[str, None] = {}
            tries = 0
            while len(chunks) < self.chunks_each:
                where, tries = draw.random(), tries + 1
                kind = "base" if where < self.known else "pool" if where < self.known + self.shared else ""
                if kind and tries < 50 * self.chunks_each:
                    (number,) = draw.choices(range(len(weights[kind])), cum_weights=weights[kind])
                    chunks[f"{kind} {number}"] = None
                else:  # unique, as is what remains when a small pool is exhausted
                    chunks[f"query {query} chunk {len(chunks)}"] = None
            yield list(chunks)


@dataclass
class Outcome:
    """The counts of one cache over a workload, in chunks. ``again``: computed although computed before."""

    asked: int = 0
    hit: int = 0
    stored: int = 0
    again: int = 0


def simulate(workload: Workload) -> tuple[Outcome, Outcome]:
    """Run a prefix cache and the Alternative Path over the same queries; neither evicts anything.

    Both start with every chunk of the knowledge base computed behind the shared prefix.
    """
    prefix, ours = Outcome(), Outcome()
    base = {f"base {number}" for number in range(workload.base)}
    paths: set[Path] = {(chunk,) for chunk in base}
    seen, copies = set(base), set(base)
    for chunks in workload:
        for number, chunk in enumerate(chunks):
            prefix.asked += 1
            ours.asked += 1
            path = tuple(chunks[: number + 1])
            if path in paths:
                prefix.hit += 1
            else:
                paths.add(path)
                prefix.again += chunk in seen
            # A missing chunk is computed behind the shared prefix, which every later path falls back to.
            if chunk in copies:
                ours.hit += 1
            copies.add(chunk)
            seen.add(chunk)
    prefix.stored, ours.stored = len(paths), len(copies)
    return prefix, ours


def _zipf(size: int, skew: float) -> list[float]:
    return list(accumulate(1.0 / (rank + 1) ** skew for rank in range(size)))


WORKLOADS = [
    Workload(),
    Workload(chunks_each=5),
    Workload(skew=0.5),
    Workload(base=10_000, pool=5_000),
]


def table() -> str:
    lines = [
        "| chunks a query | Zipf | knowledge base | shared pool | storage | computed twice by a prefix cache "
        "| of these removed | hits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for workload in WORKLOADS:
        prefix, ours = simulate(workload)
        cells = [
            f"{workload.chunks_each}",
            f"{workload.skew:g}",
            f"{workload.base:,}",
            f"{workload.pool:,}",
            f"{ours.stored / prefix.stored - 1:+.0%}",
            f"{prefix.again:,}",
            f"{1 - ours.again / max(1, prefix.again):.0%}",
            f"{prefix.hit / prefix.asked:.0%} -> {ours.hit / ours.asked:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
