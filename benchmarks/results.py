"""Fills the tables of benchmarks/results/*.md and docs/results.md from the committed rows.

    python benchmarks/results.py            # rewrites the tables and the figures
    python benchmarks/results.py --check    # fails if a table differs from what the rows give

The rows come from `make results DATA=folder`, which can be stopped and resumed. A set that some system has not finished
is left out and listed as such. The text of the pages is written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

import claims
import oracle
import paths
import trained
from analyses import table
from cacheclip_eval import plots
from cacheclip_eval.figures import summary
from cacheclip_eval.retained import retained
from cacheclip_eval.retained import table as kept
from cacheclip_eval.rows import read
from cacheclip_eval.tables import compare, summarise
from pages import DOCS, RESULTS, copies, fill
from pooled import pooled

ITEMS = 20
"""Items of a finished set."""
ROWS = ("methods", "exact", "unseen", "fresh", "scales", "tuned", "recipe", "neighbours", "quality", "fusion")

WARM = "auto:context=prompts"
COLD = "auto@0.15:fused=False"
WITHOUT = {COLD: "auto@0.15:carry=0,fused=False", WARM: "auto:carry=0,context=prompts"}
"""`auto` over warm and cold chunks, and the same systems without `Carry`."""
BESIDE = {"naive", "cacheblend@0.15", "cacheclip@0.15", "query_guided@0.15", "infoflow@0.15", "auto:context=use"}
"""Systems shown beside those of `WITHOUT`."""
SELECTION = "query_guided@0.1:context=prompts,group_size=1,layers=(0.69,0.83),normalise=chunk"
"""The selection of `auto`, among the rows about its parts."""

NQ = "nq_multidoc"
SHOWN = {
    "full": "full prefill",
    "naive": "plain reuse (`naive`)",
    "cacheblend@0.15": "CacheBlend (`cacheblend`)",
    "cacheclip@0.15": "CacheClip (`cacheclip`)",
    "infoflow@0.15": "InfoFlow (`infoflow`)",
    "query_guided@0.15": "the question's attention, last layer (`query_guided`)",
    COLD: "**`auto`, cold**: chunks encoded alone",
    WARM: "**`auto`, warm**: chunks fused as an earlier prompt had them",
}
"""The rows of docs/results.md."""
DRAWN = {
    "naive": ("left", 0),
    "epic@0.15": ("right", 0),
    "legolink@0.15": ("left", 0),
    "cacheblend@0.15": ("left", 0),
    "droidspeak@0.15": ("left", 0),
    "cachecraft@0.15": ("right", 8),
    "cacheclip@0.15": ("right", 0),
    "query_guided@0.15": ("right", 0),
    "fusionrag_selection@0.15": ("right", -4),
    "prophetkv@0.15": ("left", 0),
    "infoflow@0.15": ("left", 0),
    "psr@0.15": ("right", 0),
    "naive:context=prompts": ("left", 0),
    WITHOUT[COLD]: ("left", 0),
    WARM: ("left", 3),
    "auto:context=use": ("right", 0),
}
"""The systems in the figure of docs/results.md: published methods at 0.15, plain reuse, `auto`; for each, the alignment
of its label and its vertical offset in points."""


def finished(rows: Path, folder: Path) -> tuple[Path, dict[str, int]]:
    """The rows of sets that all their systems have finished, and the number of answered items of the other sets."""
    lines = [line for line in rows.read_text(encoding="utf-8").splitlines() if line.strip()]
    done = Counter((row["dataset"], row["system"]) for row in map(json.loads, lines) if "error" not in row)
    least: dict[str, int] = {}
    for (data, _), count in done.items():
        least[data] = min(count, least.get(data, count))
    kept = folder / f"finished-{rows.name}"
    kept.write_text(
        "".join(f"{line}\n" for line in lines if least.get(json.loads(line)["dataset"], 0) >= ITEMS), encoding="utf-8"
    )
    return kept, {data: count for data, count in least.items() if count < ITEMS}


def common(rows: Path, folder: Path, items: int = 8) -> Path:
    """The rows of items that every system has answered, for systems with at least ``items`` answers in a set."""
    lines = [line for line in rows.read_text(encoding="utf-8").splitlines() if line.strip()]
    good = [(line, row) for line, row in ((line, json.loads(line)) for line in lines) if "error" not in row]
    answered: dict[tuple[str, str], set[str]] = {}
    for _, row in good:
        answered.setdefault((row["dataset"], row["system"]), set()).add(row["id"])
    enough = {key: ids for key, ids in answered.items() if len(ids) >= items}
    shared = {data: set.intersection(*(ids for (d, _), ids in enough.items() if d == data)) for data, _ in enough}
    chosen = (
        line for line, row in good if (row["dataset"], row["system"]) in enough and row["id"] in shared[row["dataset"]]
    )
    kept = folder / f"common-{rows.name}"
    kept.write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")
    return kept


def carried(sources: Iterable[Path], folder: Path) -> Path:
    """The rows of the systems around `WITHOUT`, on the sets that `auto` over cold chunks has answered."""
    lines = [line for path in sources for line in path.read_text(encoding="utf-8").splitlines()]
    good = [(line, row) for line, row in ((line, json.loads(line)) for line in lines) if "error" not in row]
    sets = {row["dataset"] for _, row in good if row["system"] == COLD}
    wanted = {"full", *WITHOUT, *WITHOUT.values(), *BESIDE}
    kept = folder / "carried.jsonl"
    chosen = (f"{line}\n" for line, row in good if row["dataset"] in sets and row["system"] in wanted)
    kept.write_text("".join(chosen), encoding="utf-8")
    return kept


def forty(first: Path, last: Path, folder: Path) -> Path:
    """The rows of both runs on NQ, of the systems that answered all questions."""
    lines = [line for path in (first, last) for line in path.read_text(encoding="utf-8").splitlines()]
    count = Counter(json.loads(line)["system"] for line in lines)
    kept = folder / "forty.jsonl"
    chosen = (f"{line}\n" for line in lines if count[json.loads(line)["system"]] == max(count.values()))
    kept.write_text("".join(chosen), encoding="utf-8")
    return kept


def overall(rows: Path) -> str:
    """A Markdown table of each system's means over the sets, with equal weights."""
    records = summary(rows)
    full = {r["dataset"]: r["score"] for r in records if r["system"] == "full"}
    lines = []
    for system in dict.fromkeys(r["system"] for r in records):
        mine = [r for r in records if r["system"] == system]
        if len(mine) < len(full):
            continue
        means = {name: mean(r[name] for r in mine) for name in ("score", "agree", "kl", "kl_median")}
        ratio = "–" if system == "full" else f"{mean(r['ratio'] for r in mine):.3f}"
        share = f"{means['score'] / mean(full.values()):.0%}"
        numbers = [f"{means[name]:.3f}" for name in ("agree", "kl", "kl_median")]
        lines.append([system, f"{means['score']:.3f}", share, *numbers, ratio])
    return table(["system", "score", "of full prefill's", "agree", "KL", "median", "ratio"], lines)


def chosen(rows: Path) -> str:
    """The table of docs/results.md: means over the sets but NQ, with equal weights, and NQ separately."""
    records = summary(rows)

    def over(system: str, name: str, nq: bool) -> float:
        return mean(r[name] for r in records if r["system"] == system and (r["dataset"] == NQ) == nq)

    lines = []
    for system, words in SHOWN.items():
        numbers = []
        for nq in (False, True):
            score = over(system, "score", nq)
            numbers += [f"{score:.3f} ({score / over('full', 'score', nq):.0%})", f"{over(system, 'kl', nq):.3f}"]
        ratio = "all" if system == "full" else f"{over(system, 'ratio', False):.2f}"
        lines.append([words, ratio, *numbers])
    return table(["", "recomputed", "score, five sets", "KL", "score, NQ", "KL"], lines)


def pareto(rows: Path) -> None:
    """Draw KL against the recomputed share, averaged over all sets, and KL against time, one panel per set.

    The figure in the documentation shows shares because the rows' times come from a busy machine.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    records = summary(rows)
    plots.pareto(records, RESULTS / "pareto.svg")
    sets = {r["dataset"] for r in records}
    points = {}
    for system in DRAWN:
        mine = [r for r in records if r["system"] == system]
        if len(mine) == len(sets):
            points[system] = (mean(r["ratio"] for r in mine), mean(r["kl"] for r in mine))
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for (system, place), best in zip(points.items(), plots.front_of(list(points.values())), strict=True):
        side, up = DRAWN[system]
        away = {"xytext": (6 if side == "left" else -6, up), "textcoords": "offset points"}
        axis.plot(*place, marker="o", color="tab:red" if best else "tab:gray")
        axis.annotate(system.replace("@0.15", ""), place, ha=side, va="center", fontsize=8, **away)
    axis.set_xlabel("recomputed share of the stored tokens")
    axis.set_ylabel("KL to full prefill, nats")
    axis.set_title(f"Qwen2.5-Coder-1.5B, mean over {len(sets)} sets of {ITEMS} questions", fontsize=9)
    axis.set_ylim(bottom=0)
    with rc_context({"svg.hashsalt": "cacheclip"}):
        figure.savefig(DOCS / "figures" / "pareto.svg", metadata={"Date": None})


def ladder(file: Path) -> str:
    """What the ladder's systems keep of full prefill, its sets with equal weights."""
    return kept(retained(read(file).values(), COLD), "today's")


def speed() -> dict[str, str]:
    """Tables of the rows of `benchmarks/speed.py`: speedups, time by stage, ingestion and memory."""
    found = [
        json.loads(line)
        for name in ("speed", "speed-auto")
        for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]

    def named(row: dict[str, object], *others: str) -> list[str]:
        return [str(row["model"]).removesuffix("-instruct"), *others]

    times, seconds, costs = [], [], []
    for row in found:
        if "breakdown (s)" in row:
            ratio = row.get("ratio", row["r"])
            case = named(row, row["method"], f"{row['prompt tokens']:,}")
            memory, disk, bound = (
                f"{value:.1f}x" for name, value in row.items() if name.endswith(("KV in memory", "KV on disk", "bound"))
            )
            kl = f"{row['KL of the first token']:.3f} ({row['KL of naive reuse']:.3f})"
            full = f"{row['full prefill (s)']:.1f} s"
            times.append([*case, f"{ratio:g}", full, memory, disk, bound, row["first tokens equal"], kl])
            parts = row["breakdown (s)"] | {"load": row["load from disk (s)"]}
            seconds.append([*case, *(f"{value:.3f}" for value in parts.values())])
        elif "encoding / plain forward" in row:
            costs.append(named(row, f"encoding a chunk of 512 tokens: {row['encoding / plain forward']:.2f} forwards"))
        else:
            what = (
                f"a prompt of {row['prompt tokens']:,} tokens, {row['recomputed and fresh rows']:,} rows computed: "
                f"{row['peak added (MiB)']} MiB added at the peak, {row['canvas (MiB)']} of them the request's KV"
            )
            costs.append(named(row, what))
    case = ["model", "method", "prompt tokens"]
    steps = ["recognise", "tokenise", "select", "load (disk)", "place", "recompute", "first token"]
    faster = ["KV in memory", "KV on disk", "bound", "first tokens equal", "KL of the first token (plain reuse)"]
    return {
        "speed": table([*case, "ratio", "full prefill", *faster], times),
        "speed-steps": table([*case, *steps], seconds),
        "speed-costs": table(["model", "measured"], costs),
    }


def tuned() -> dict[str, str]:
    """Tables of the rows of `benchmarks/trained.py` and `benchmarks/oracle.py`."""
    cards = json.loads((RESULTS / "trained-cards.json").read_text(encoding="utf-8"))
    answering, selecting = (claims.by_system(RESULTS / f"trained-{model}.jsonl") for model in ("135m", "0.5b"))
    return {
        "trained": trained.overview(answering),
        "trained-selection": trained.overview(selecting),
        "trained-claims": trained.claims([answering, selecting], cards),
        "trained-curves": trained.curves(cards),
        "oracle": oracle.table(oracle.read(RESULTS / "oracle-0.5b.jsonl")),
    }


def tables(rows: dict[str, Path], folder: Path) -> dict[str, str]:
    methods, others = finished(rows["methods-1.5b"], folder)
    scores = claims.by_system(methods)
    waiting = ", ".join(f"{data} ({count} of {ITEMS})" for data, count in others.items())
    together = carried([rows["methods-1.5b"], rows["unseen-1.5b"]], folder)
    against: dict[str, Callable[[str], str]] = {
        "recipe": lambda _: SELECTION,
        "neighbours": lambda system: f"{system.partition(':')[0]}:carry=0,fused=False",
    }
    found = {
        "eight": chosen(together),
        "overall": overall(methods),
        "waiting": f"Not finished, so not here: {waiting}." if waiting else "",
        "aims": "\n".join(claims.aims(scores, system) for system in claims.AUTOS if system in scores),
        "claims": claims.published(scores),
        "sets": summarise(methods),
        "minus-cacheclip": compare(methods, "cacheclip@0.15"),
        "minus-auto": compare(methods, WARM),
        "carried": pooled(together, lambda system: WITHOUT.get(system, WITHOUT[COLD])),
        "forty": pooled(forty(rows["unseen-1.5b"], rows["fresh-1.5b"], folder), lambda _: WITHOUT[WARM]),
        "quality": summarise(rows["quality-1.5b"]),
        "quality-minus-naive": compare(rows["quality-1.5b"], "naive"),
        "fusion": summarise(common(rows["fusion-1.5b"], folder)),
        "paths": paths.table(),
        "ladder": ladder(rows["ladder-0.5b"]),
        "reported": kept(retained(read(RESULTS / "report-1.5b.jsonl").values(), COLD), "cold's"),
        **tuned(),
        **speed(),
    }
    for name in ("exact", "unseen", "fresh", "scales", "tuned", "recipe", "neighbours"):
        shared = common(rows[f"{name}-1.5b"], folder)
        found[name] = summarise(shared)
        if name in against:
            found[f"{name}-together"] = pooled(shared, against[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is not what the rows give")
    args = parser.parse_args()
    pages = [page for page in sorted(RESULTS.glob("*.md")) if page.name != "analyses.md"]
    with tempfile.TemporaryDirectory() as folder:
        rows = copies([*(f"{name}-1.5b" for name in ROWS), "ladder-0.5b"], Path(folder))
        changed = fill([*pages, DOCS / "results.md"], tables(rows, Path(folder)), check=args.check)
        if not args.check:
            pareto(finished(rows["methods-1.5b"], Path(folder))[0])
    if args.check and changed:
        sys.exit(f"not what the rows give: {', '.join(page.name for page in changed)}")


if __name__ == "__main__":
    main()
