"""FusionRAG's Alternative Path against an ordinary prefix cache, simulated: storage, chunks computed twice, hits.

    python benchmarks/paths.py

The paper (arXiv 2601.12904, 5.3.3) says: 1,000 queries; 60 % of chunks from the knowledge base, 30 % new but shared
among users, 10 % unique; storage -71 %, 82.3 % of recomputes of chunks seen before removed, 77.9 % hits. It says
neither how many chunks a query has nor how popular they are; the rows below vary both.
"""

from __future__ import annotations

from cacheclip_rag.fusion import Workload, simulate

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
