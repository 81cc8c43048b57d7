"""Writes docs/results.md from committed rows.

    python benchmarks/results.py

The rows come from `make results DATA=folder`, which can be stopped and goes on where it was: a set that not all systems
have answered to its end is left out, and said to be. What stands between the tables is in `results-*.md` beside this.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import claims
import paths
from cacheclip_eval import plots
from cacheclip_eval.figures import summary
from cacheclip_eval.tables import compare, summarise
from pooled import pooled

AUTO = "query_guided@0.1:context=prompts,layers=(0.69,0.83),normalise=chunk,window=1"
"""The selection of `auto`, among the rows about its parts."""

ALONE = "auto@0.15:carry=0,fused=False"
CARRIED = "auto@0.15:fused=False"
WITHOUT = {CARRIED: ALONE, "auto:context=prompts": "auto:carry=0,context=prompts"}
"""What carries over what recomputing changed, and the same without."""
BESIDE = {"naive", "cacheblend@0.15", "cacheclip@0.15", "query_guided@0.15", "infoflow@0.15", "auto:context=use"}
"""What they are shown beside."""

SECTIONS: list[tuple[str, list[str], Callable[[str], str] | None]] = [
    ("exact", ["exact"], None),
    ("unseen", ["unseen", "fresh"], None),
    ("scales", ["scales", "tuned"], None),
    ("recipe", ["recipe"], lambda _: AUTO),
    ("neighbours", ["neighbours"], lambda system: f"{system.partition(':')[0]}:carry=0,fused=False"),
]
"""Of the page: its words, its rows, and whom each system is held against where all sets are taken together."""


def words(name: str) -> str:
    return (Path(__file__).parent / f"results-{name}.md").read_text(encoding="utf-8")


def finished(rows: Path, items: int, folder: Path) -> tuple[Path, dict[str, int]]:
    """The rows of sets that every system asked about them has answered ``items`` items of, and how far others are."""
    lines = [line for line in rows.read_text(encoding="utf-8").splitlines() if line.strip()]
    done = Counter((row["dataset"], row["system"]) for row in map(json.loads, lines) if "error" not in row)
    least: dict[str, int] = {}
    for (data, _), count in done.items():
        least[data] = min(count, least.get(data, count))
    kept = folder / rows.name
    kept.write_text(
        "".join(f"{line}\n" for line in lines if least.get(json.loads(line)["dataset"], 0) >= items), encoding="utf-8"
    )
    return kept, {data: count for data, count in least.items() if count < items}


def common(rows: Path, items: int, folder: Path) -> Path:
    """The rows of items that every system has answered, of the systems that have answered ``items`` of a set at all."""
    lines = [line for line in rows.read_text(encoding="utf-8").splitlines() if line.strip()]
    good = [(line, row) for line, row in ((line, json.loads(line)) for line in lines) if "error" not in row]
    answered: dict[tuple[str, str], set[str]] = {}
    for _, row in good:
        answered.setdefault((row["dataset"], row["system"]), set()).add(row["id"])
    enough = {key: ids for key, ids in answered.items() if len(ids) >= items}
    shared = {data: set.intersection(*(ids for (d, _), ids in enough.items() if d == data)) for data, _ in enough}
    kept = folder / rows.name
    chosen = (
        line for line, row in good if (row["dataset"], row["system"]) in enough and row["id"] in shared[row["dataset"]]
    )
    kept.write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")
    return kept


def carried(rows: Path, folder: Path) -> Path:
    """The rows of a few systems, on the sets on which `auto` has been answered with carrying over."""
    lines = [line for name in ("methods", "unseen") for line in (rows / f"{name}-1.5b.jsonl").read_text().splitlines()]
    good = [(line, row) for line, row in ((line, json.loads(line)) for line in lines) if "error" not in row]
    sets = {row["dataset"] for _, row in good if row["system"] == CARRIED}
    wanted = {"full", *WITHOUT, *WITHOUT.values(), *BESIDE}
    kept = folder / "carried.jsonl"
    chosen = (f"{line}\n" for line, row in good if row["dataset"] in sets and row["system"] in wanted)
    kept.write_text("".join(chosen), encoding="utf-8")
    return kept


def overall(rows: Path) -> str:
    """A Markdown table of each system's means over the sets, every set counting the same."""
    records = summary(rows)
    full = {r["dataset"]: r["score"] for r in records if r["system"] == "full"}
    lines = ["| system | score | of full prefill's | agree | KL | median | ratio |", "|---" * 7 + "|"]
    for system in dict.fromkeys(r["system"] for r in records):
        mine = [r for r in records if r["system"] == system]
        if len(mine) < len(full):
            continue
        means = {name: mean(r[name] for r in mine) for name in ("score", "agree", "kl", "kl_median")}
        ratio = "–" if system == "full" else f"{mean(r['ratio'] for r in mine):.3f}"
        lines.append(
            f"| {system} | {means['score']:.3f} | {means['score'] / mean(full.values()):.0%} | {means['agree']:.3f} "
            f"| {means['kl']:.3f} | {means['kl_median']:.3f} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path(__file__).parent / "results", help="a folder")
    parser.add_argument("--items", type=int, default=20, help="of a set that is finished")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--baselines", nargs="+", default=["cacheclip@0.15", "auto:context=prompts"])
    args = parser.parse_args()
    figure = args.out.parent / "figures" / "pareto.svg"
    figure.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rows, others = finished(args.rows / "methods-1.5b.jsonl", args.items, Path(folder))
        plots.pareto(summary(rows), figure)
        scores = claims.by_system(rows)
        waiting = ", ".join(f"{data} ({count} of {args.items})" for data, count in others.items())
        parts = [
            words("head"),
            f"Not finished, so not here: {waiting}.\n" if waiting else "",
            f"\n## All sets\n\n{overall(rows)}",
            "## The aims of `auto`\n",
            *(claims.aims(scores, system) for system in claims.AUTOS if system in scores),
            words("claims"),
            claims.published(scores),
            "## Each set\n",
            summarise(rows),
            f"\n![Quality against time to first token](figures/{figure.name})\n",
            *(f"\n## Differences from `{name}`\n\n{compare(rows, name)}" for name in args.baselines),
        ]
        parts += [words("carried"), pooled(carried(args.rows, Path(folder)), lambda system: WITHOUT.get(system, ALONE))]
        for section, names, against in SECTIONS:
            known = [path for name in names if (path := args.rows / f"{name}-1.5b.jsonl").exists()]
            parts += [words(section)] if known else []
            for path in known:
                shared = common(path, 8, Path(folder))
                parts += [pooled(shared, against)] if against is not None else []
                parts.append(summarise(shared))
        parts += [words("paths"), paths.table()]
    args.out.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
