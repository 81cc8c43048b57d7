"""Writes docs/results.md from committed rows.

    python benchmarks/results.py benchmarks/results/methods-1.5b.jsonl --fusion benchmarks/results/fusion-1.5b.jsonl

The rows come from `make results DATA=folder`, which can be stopped and goes on where it was: a set that not all systems
have answered to its end is left out, and said to be.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

from cacheclip_rag.evaluation import plots
from cacheclip_rag.evaluation.figures import summary
from cacheclip_rag.evaluation.tables import compare, summarise

HEAD = Path(__file__).parent / "results-head.md"
FUSION = Path(__file__).parent / "results-fusion.md"


def finished(rows: Path, items: int, folder: Path) -> tuple[Path, dict[str, int]]:
    """The rows of sets that every system has answered ``items`` items of, and how far the other sets are."""
    lines = [line for line in rows.read_text(encoding="utf-8").splitlines() if line.strip()]
    done = Counter((row["dataset"], row["system"]) for row in map(json.loads, lines) if "error" not in row)
    systems = {system for _, system in done}
    least = {data: min(done[data, system] for system in systems) for data, _ in done}
    kept = folder / rows.name
    kept.write_text(
        "".join(f"{line}\n" for line in lines if least.get(json.loads(line)["dataset"], 0) >= items), encoding="utf-8"
    )
    return kept, {data: count for data, count in least.items() if count < items}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--fusion", type=Path, help="rows about fused chunks")
    parser.add_argument("--items", type=int, default=20, help="of a set that is finished")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--baseline", default="cacheclip@0.15")
    args = parser.parse_args()
    figure = args.out.parent / "figures" / "pareto.svg"
    figure.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rows, others = finished(args.rows, args.items, Path(folder))
        plots.pareto(summary(rows), figure)
        waiting = ", ".join(f"{data} ({count} of {args.items})" for data, count in others.items())
        parts = [
            HEAD.read_text(encoding="utf-8"),
            f"Not finished, so not here: {waiting}.\n" if waiting else "",
            summarise(rows),
            f"\n![Quality against time to first token](figures/{figure.name})\n",
            f"\n## Differences from `{args.baseline}`\n\n{compare(rows, args.baseline)}",
        ]
    if args.fusion:
        parts += [FUSION.read_text(encoding="utf-8"), summarise(args.fusion)]
    args.out.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
