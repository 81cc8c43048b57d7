"""Writes docs/results.md from committed rows: `python benchmarks/results.py benchmarks/results/methods-1.5b.jsonl`.

The rows come from `make results DATA=folder`, which can be stopped and goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cacheclip_rag.evaluation import plots
from cacheclip_rag.evaluation.figures import summary
from cacheclip_rag.evaluation.tables import compare, summarise

HEAD = Path(__file__).parent / "results-head.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--baseline", default="cacheclip@0.15")
    args = parser.parse_args()
    figure = args.out.parent / "figures" / "pareto.svg"
    figure.parent.mkdir(exist_ok=True)
    plots.pareto(summary(args.rows), figure)
    parts = [
        HEAD.read_text(encoding="utf-8"),
        summarise(args.rows),
        f"\n![Quality against time to first token](figures/{figure.name})\n",
        f"\n## Differences from `{args.baseline}`\n\n{compare(args.rows, args.baseline)}",
    ]
    args.out.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
