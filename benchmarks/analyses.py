"""Fills the tables of benchmarks/results/analyses.md from rows of `cacheclip analyse` and `cacheclip eval`.

    python benchmarks/analyses.py

`make analyses DATA=folder` and `make sensitivity DATA=folder` measure, draw the figures and call this.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from cacheclip_eval import plots, rows, summary
from cacheclip_eval.plots import parameter_of
from pages import DOCS, RESULTS, copies, fill

DEPTHS = ((0.0, 0.0), (0.01, 0.25), (0.25, 0.5), (0.5, 0.69), (0.69, 0.83), (0.83, 0.99), (1.0, 1.0))
"""The first layer, bands between, the last layer; `auto` uses 0.69 to 0.83."""
SELECTING = (0, 1, 4, 9, 14, 19, 23, 27)
PLACES = ((0, 1), (1, 2), (2, 5), (5, 10), (10, 20))
"""Twentieths of a chunk."""

SHOWN = (
    "naive",
    "epic@0.15",
    "cacheblend@0.15",
    "cacheclip@0.15",
    "query_guided@0.15",
    "infoflow@0.15",
    "auto:context=prompts",
    "auto:context=use",
)
"""The systems in the figure by length."""

Rows = Sequence[dict[str, Any]]


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)) + "\n"


def agreement(rows: Rows) -> str:
    """One row per model, bands of its depth in columns: Jaccard, and the KL in nats."""

    def cell(model: str, low: float, high: float) -> str:
        found = [row for row in rows if row["model"] == model and low <= row["depth"] <= high]
        if not found:
            return "–"
        return f"{mean(row['jaccard'] for row in found):.2f} ({mean(row['kl'] for row in found):.2f})"

    columns = [f"{low:.0%}" if low == high else f"{low:.0%} to {high:.0%}" for low, high in DEPTHS]
    models = dict.fromkeys(row["model"] for row in rows)
    return table(["model", *columns], ([model, *(cell(model, *depth) for depth in DEPTHS)] for model in models))


def foretold(rows: Rows) -> str:
    """The share of a layer's (row) most deviating tokens that another layer (column) finds."""
    layers = [layer for layer in SELECTING if layer < len(rows[0]["overlap"])]

    def cell(selecting: int, wanted: int) -> str:
        return f"{mean(row['overlap'][selecting] for row in rows if row['layer'] == wanted):.2f}"

    return table(["layer", *map(str, layers)], ([str(w), *(cell(s, w) for s in layers)] for w in layers))


def where(rows: Rows) -> str:
    """Mean key deviation by place in the chunk, one row per layer, as a multiple of the layer's mean."""

    def cell(layer: int, first: int, last: int) -> str:
        mine = [row for row in rows if row["layer"] == layer]
        values = [mean(v for v in row["by_place"][first:last] if v is not None) / row["mean"] for row in mine]
        return f"{mean(values):.2f}"

    layers = [layer for layer in SELECTING if layer < len(rows[0]["overlap"]) and layer]
    columns = [f"{first * 5} to {last * 5} %" for first, last in PLACES]
    means = {layer: mean(row["mean"] for row in rows if row["layer"] == layer) for layer in layers}
    lines = ([str(n), f"{means[n]:.2f}", *(cell(n, *place) for place in PLACES)] for n in layers)
    return table(["layer", "mean", *columns], lines)


def shared(rows: Rows) -> str:
    """The share of the squared deviation that is common to all tokens of a chunk, layers in columns."""
    layers = [layer for layer in SELECTING if layer < len(rows[0]["overlap"]) and layer]

    def cell(name: str, layer: int) -> str:
        return f"{mean(row[name] for row in rows if row['layer'] == layer):.0%}"

    lines = ([kind, *(cell(f"shared_{kind}", layer) for layer in layers)] for kind in ("keys", "values"))
    return table(["layer", *map(str, layers)], lines)


def hits(rows: Rows) -> str:
    """One row per cache: the share of prompt tokens found, the part found in every prompt, and how often more was."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [row["found"] for row in rows if row["method"] == method][1:]  # the first finds nothing
        tokens = sum(row["prompt_tokens"] for row in rows if row["method"] == method)
        preamble = min(found)
        share, of_preamble = sum(found) / tokens, preamble * len(found) / tokens
        more = mean(number > preamble for number in found)
        lines.append([method, f"{share:.1%}", f"{of_preamble:.1%}", f"{more:.0%}"])
    return table(["cache", "found", "what every question finds", "questions that find more"], lines)


def swept(path: Path, parameter: str) -> str:
    """One row per method, the values of a swept parameter in columns: KL, and in brackets the agreement."""
    found: dict[str, dict[str, str]] = {}
    for record in summary(path):
        method, value = parameter_of(record["system"], parameter)
        if value is not None:
            found.setdefault(method, {})[f"{value}"] = f"{record['kl']:.3f} ({record['agree']:.2f})"
    return _columns(found)


def by_set(path: Path) -> str:
    """One row per system, data sets in columns, named by what follows the last ``_``: KL and agreement."""
    found: dict[str, dict[str, str]] = {}
    for record in summary(path):
        if record["system"] != "full":
            column = record["dataset"].rpartition("_")[2]
            found.setdefault(record["system"], {})[column] = f"{record['kl']:.3f} ({record['agree']:.2f})"
    return _columns(found)


def needles(methods: Path) -> Rows:
    """The rows of RULER, whose tasks are the same at 2k and 4k tokens."""
    kept = rows.read(methods).values()
    return [row for row in kept if row["dataset"].startswith("ruler") and row["system"] in ("full", *SHOWN)]


def by_length(found: Rows) -> str:
    """One row per system, the two lengths in columns: KL, and in brackets the share of full prefill's score."""
    sets = dict.fromkeys(row["dataset"] for row in found)

    def over(system: str, data: str, name: str) -> float:
        return mean(row[name] for row in found if row["system"] == system and row["dataset"] == data)

    def cell(system: str, data: str) -> str:
        return f"{over(system, data, 'kl'):.3f} ({over(system, data, 'score') / over('full', data, 'score'):.0%})"

    lines = ([f"`{system}`", *(cell(system, data) for data in sets)] for system in SHOWN)
    return table(["", *(data.replace("_", " at ") for data in sets)], lines)


def _columns(found: dict[str, dict[str, str]]) -> str:
    columns = list(dict.fromkeys(value for cells in found.values() for value in cells))
    lines = ([f"`{name}`", *(cells.get(value, "–") for value in columns)] for name, cells in found.items())
    return table(["", *columns], lines)


def pictures(found: dict[str, Path], ruler: Rows) -> None:
    """The figures of docs/analyses.md that are drawn from rows of `cacheclip eval`."""
    figures = DOCS / "figures"
    plots.length(ruler, figures / "length.svg")
    for name, path in found.items():
        if name == "chunks-0.5b":
            plots.length(list(rows.read(path).values()), figures / "chunks.svg", by="chunks")
        elif name != "methods-1.5b":
            parameter = name.partition("-")[0]
            plots.sweep(summary(path), figures / f"{parameter}.svg", parameter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is not what the rows give")
    args = parser.parse_args()
    one, other, reused = (
        [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]
        for name in ("agreement-1.5b.jsonl", "deviation-1.5b.jsonl", "hits.jsonl")
    )
    with tempfile.TemporaryDirectory() as folder:
        found = copies(("methods-1.5b", "ratio-0.5b", "prefix-0.5b", "chunks-0.5b"), Path(folder))
        ruler = needles(found["methods-1.5b"])
        parts = {
            "agreement": agreement(one),
            "where": where(other),
            "foretold": foretold(other),
            "shared": shared(other),
            "hits": hits(reused),
            "ratio": swept(found["ratio-0.5b"], "ratio"),
            "prefix": swept(found["prefix-0.5b"], "prefix"),
            "chunks": by_set(found["chunks-0.5b"]),
            "length": by_length(ruler),
        }
        changed = fill([RESULTS / "analyses.md"], parts, check=args.check)
        if not args.check:
            pictures(found, ruler)
    if args.check and changed:
        sys.exit("not what the rows give: analyses.md")


if __name__ == "__main__":
    main()
