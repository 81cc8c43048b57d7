"""Figures of rows, with matplotlib: ``pip install 'cacheclip-rag[plots]'``."""

from __future__ import annotations

from bisect import bisect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import mean
from typing import Any

from cacheclip_rag import spec
from cacheclip_rag.errors import ConfigurationError

FORMATS = (".svg", ".png", ".pdf")

_INT8 = "+int8"
"""The suffix of labels of systems with int8 KV."""


def _axes(columns: int, width: float = 5.0, height: float = 3.6) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("figures need matplotlib: pip install 'cacheclip-rag[plots]'") from error
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Any, path: str | Path) -> None:
    """Write the figure reproducibly: the same rows give the same file."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "cacheclip"}):
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def agreement(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Jaccard and KL against the primary's last layer, over relative depth, one line per model."""
    rows = list(rows)
    figure, axes = _axes(2)
    for axis, measure, label in zip(axes, ("jaccard", "kl"), ("Jaccard of chosen tokens", "KL, nats"), strict=True):
        for model in dict.fromkeys(row["model"] for row in rows):
            by_depth = defaultdict(list)
            for row in rows:
                if row["model"] == model:
                    by_depth[row["depth"]].append(row[measure])
            axis.plot(*zip(*[(d, mean(v)) for d, v in sorted(by_depth.items())], strict=True), marker=".", label=model)
        axis.set_xlabel("relative depth of the layer")
        axis.set_ylabel(label)
    axes[0].legend()
    _save(figure, path)


def deviation(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Key deviation by place in the chunk at a few layers, and how well layers predict each other's top tokens."""
    rows = list(rows)
    figure, axes = _axes(2)
    layers = sorted({row["layer"] for row in rows})
    for layer in [layers[i * (len(layers) - 1) // 4] for i in range(5)] if len(layers) > 4 else layers:
        mine = [row["by_place"] for row in rows if row["layer"] == layer]
        bins = range(len(mine[0]))
        values = [mean([m[b] for m in mine if m[b] is not None] or [0.0]) for b in bins]
        axes[0].plot([(b + 0.5) / len(values) for b in bins], values, label=f"layer {layer}")
    axes[0].set_xlabel("place in the chunk")
    axes[0].set_ylabel("mean ||ΔK||")
    axes[0].set_yscale("log")
    axes[0].legend()
    table = [[mean(r["overlap"][a] for r in rows if r["layer"] == b) for a in range(len(layers))] for b in layers]
    image = axes[1].imshow(table, origin="lower", vmin=0.0, vmax=1.0, aspect="auto")
    axes[1].set_xlabel("selecting layer")
    axes[1].set_ylabel("layer whose top tokens it should find")
    figure.colorbar(image, ax=axes[1], label="share found")
    _save(figure, path)


def hits(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """The cumulative share of prompt tokens found in the cache, over the questions asked, one line per cache."""
    rows = list(rows)
    figure, axes = _axes(1)
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        there, asked = (list(accumulate(row[name] for row in mine)) for name in ("found", "prompt_tokens"))
        shares = [found / tokens for found, tokens in zip(there, asked, strict=True)]
        axes[0].plot(range(1, len(mine) + 1), shares, marker=".", label=method)
    axes[0].set_xlabel("questions")
    axes[0].set_ylabel("share of prompt tokens found")
    axes[0].legend()
    _save(figure, path)


def pareto(records: Sequence[dict[str, Any]], path: str | Path, measure: str = "kl") -> None:
    """Quality against time to first token (relative to full prefill's): a point per system, a panel per data set."""
    datasets = list(dict.fromkeys(record["dataset"] for record in records))
    figure, axes = _axes(max(1, len(datasets)))
    for axis, dataset in zip(axes, datasets, strict=False):
        points = [r for r in records if r["dataset"] == dataset and r.get("ttft") and r.get(measure) is not None]
        points = [r for r in points if r["system"] != "full"]
        front = front_of([(r["ttft"], r[measure]) for r in points], lower=measure == "kl")
        for record, best in zip(points, front, strict=True):
            axis.plot(record["ttft"], record[measure], marker="o", color="tab:red" if best else "tab:gray")
            axis.annotate(record["system"], (record["ttft"], record[measure]), fontsize=6)
        axis.set_title(dataset, fontsize=9)
        axis.set_xlabel("time to first token / full prefill's")
        axis.set_ylabel(measure)
    _save(figure, path)


def front_of(points: Sequence[tuple[float, float]], lower: bool = True) -> list[bool]:
    """Which points ``(cost, measure)`` are on the Pareto front; ``lower``: whether a lower measure is better."""
    sign = 1.0 if lower else -1.0
    signed = [(cost, sign * value) for cost, value in points]
    return [not any(c <= cost and v <= value and (c, v) != (cost, value) for c, v in signed) for cost, value in signed]


def sweep(records: Sequence[dict[str, Any]], path: str | Path, parameter: str, measure: str = "kl") -> None:
    """A measure over one swept parameter, taken from labels (``name:parameter=value``), one line per method and data
    set.
    """
    figure, axes = _axes(1)
    lines: dict[str, list[tuple[Any, float]]] = defaultdict(list)
    for record in records:
        name, value = parameter_of(record["system"], parameter)
        if value is not None and record.get(measure) is not None:
            lines[f"{name}, {record['dataset']}"].append((value, record[measure]))
    if not lines:
        raise ConfigurationError(f"no system of these rows has a {parameter}; run with --sweep {parameter}=...")
    for label, points in lines.items():
        if all(isinstance(value, float) for value, _ in points):
            points.sort()  # rows are in the order in which systems were run
        axes[0].plot(*zip(*points, strict=True), marker="o", label=label)
    axes[0].set_xlabel(parameter)
    axes[0].set_ylabel(measure)
    axes[0].legend(fontsize=6)
    _save(figure, path)


def parameter_of(label: str, parameter: str) -> tuple[str, Any]:
    """A system's label without a parameter (``"ratio"`` is one), and the parameter's value, or None."""
    dtype = _INT8 if label.endswith(_INT8) else ""
    head, _, rest = label.removesuffix(_INT8).partition(":")
    name, _, ratio = head.partition("@")
    if parameter == "ratio":
        return (f"{name}:{rest}" if rest else name) + dtype, (float(ratio) if ratio else None)
    values = dict(part.partition("=")[::2] for part in spec.split(rest))
    value = values.pop(parameter, None)
    others = ",".join(f"{one}={other}" for one, other in values.items())
    line = (f"{head}:{others}" if others else head) + dtype
    try:
        return line, None if value is None else float(value)
    except ValueError:
        return line, value


def length(rows: Iterable[dict[str, Any]], path: str | Path, by: str = "prompt_tokens", measure: str = "kl") -> None:
    """A measure against the length of the prompt (or ``by="chunks"``), one line per system (`quarters`)."""
    usable = [
        row
        for row in rows
        if isinstance(row.get(by), int | float) and row[by] and row.get(measure) is not None and row["system"] != "full"
    ]
    if not usable:
        raise ConfigurationError(f"no rows say {by} and {measure} in numbers: by is prompt_tokens or chunks")
    figure, axes = _axes(1)
    for system, points in quarters(usable, by, measure).items():
        axes[0].plot(*zip(*points, strict=True), marker="o", label=system)
    axes[0].set_xlabel(by.replace("_", " "))
    axes[0].set_ylabel(measure)
    axes[0].legend(fontsize=6)
    _save(figure, path)


def quarters(rows: Sequence[dict[str, Any]], by: str, measure: str) -> dict[str, list[tuple[float, float]]]:
    """Means of ``(by, measure)`` by system: one point per value of ``by`` if there are at most six, else one per
    quarter of the rows, sorted by ``by``; rows with the same value stay together.
    """
    values = sorted({row[by] for row in rows})
    if len(values) > 6:
        places = sorted(row[by] for row in rows)
        values = sorted({places[len(places) * quarter // 4] for quarter in range(4)})
    points: dict[str, list[tuple[float, float]]] = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        groups = defaultdict(list)
        for row in rows:
            if row["system"] == system:
                groups[bisect(values, row[by])].append(row)
        points[system] = [
            (mean(r[by] for r in group), mean(r[measure] for r in group)) for _, group in sorted(groups.items())
        ]
    return points
