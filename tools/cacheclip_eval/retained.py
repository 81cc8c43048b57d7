"""What systems keep of full prefill, over several data sets together: score, answers, and the KL's tail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .metrics import normalise
from .rows import Row

LEVEL = 0.9
"""The level of the one-sided bound on the share of full prefill's score."""

_RESAMPLES = 4_000

Sets = Mapping[str, Sequence[tuple[Row, Row, Row]]]
"""By data set, for each item: full prefill's row, the system's and the baseline's."""

Statistic = Callable[[Sequence[np.ndarray[Any, Any]]], float]


def retained(rows: Iterable[Row], baseline: str | None = None) -> list[dict[str, Any]]:
    """One record per system, over the items that full prefill, the system and the ``baseline`` answered.

    Every data set has the same weight, whatever the number of its items; intervals are bootstrapped inside each set.
    ``kept``: mean score / full prefill's; ``kept_bound``: its one-sided lower bound (90 %). ``changed``: the share of
    items with another answer than full prefill's (in SQuAD's normal form); ``better`` and ``worse``: those of them with
    a higher and a lower score. ``kl``, ``kl_interval`` (95 %), ``kl_median`` and ``kl_p95`` (of all items together),
    ``ratio``. ``kl_difference`` and ``kl_difference_interval``: against the baseline, paired over items. ``items``: by
    data set.
    """
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if "error" not in row:
            found.setdefault(row["dataset"], {}).setdefault(row["system"], {})[row["id"]] = row
    systems = list(dict.fromkeys(system for by_system in found.values() for system in by_system))
    records = []
    for system in systems:
        triples = {name: _triples(by_system, system, baseline or "full") for name, by_system in found.items()}
        triples = {name: mine for name, mine in triples.items() if mine}
        if triples:
            records.append({"system": system, "items": {n: len(mine) for n, mine in triples.items()}, **_of(triples)})
    return records


def _triples(by_system: Mapping[str, Mapping[str, Row]], system: str, baseline: str) -> list[tuple[Row, Row, Row]]:
    full, mine, base = (by_system.get(name, {}) for name in ("full", system, baseline))
    return [(full[id], mine[id], base[id]) for id in mine if id in full and id in base]


def _of(sets: Sets) -> dict[str, Any]:
    def each(value: Callable[[Row, Row, Row], Sequence[float]]) -> list[np.ndarray[Any, Any]]:
        return [np.asarray([value(*triple) for triple in mine], dtype=np.float64) for mine in sets.values()]

    scores = each(lambda full, mine, _: (mine["score"], full["score"]))
    changed = each(lambda full, mine, _: _change(full, mine))
    kl = each(lambda full, mine, base: (mine["kl"], mine["kl"] - base["kl"]))
    together = np.concatenate(kl)[:, 0]
    low, _ = _bootstrap(scores, _share, 1 - 2 * (1 - LEVEL))
    names = ("changed", "better", "worse")
    ratios = each(lambda full, mine, _: (mine.get("ratio") or 0.0,))
    return {
        "score": _mean(scores, 0),
        "kept": _share(scores),
        "kept_bound": low,
        **{name: _mean(changed, column) for column, name in enumerate(names)},
        "kl": _mean(kl, 0),
        "kl_interval": _bootstrap(kl, lambda parts: _mean(parts, 0)),
        "kl_median": float(np.median(together)),
        "kl_p95": float(np.quantile(together, 0.95)),
        "kl_difference": _mean(kl, 1),
        "kl_difference_interval": _bootstrap(kl, lambda parts: _mean(parts, 1)),
        "ratio": _mean(ratios, 0),
    }


def _change(full: Row, mine: Row) -> tuple[float, float, float]:
    other = normalise(mine["answer"]) != normalise(full["answer"])
    return float(other), float(other and mine["score"] > full["score"]), float(other and mine["score"] < full["score"])


def _mean(parts: Sequence[np.ndarray[Any, Any]], column: int) -> float:
    return float(np.mean([part[:, column].mean() for part in parts]))


def _share(parts: Sequence[np.ndarray[Any, Any]]) -> float:
    full = _mean(parts, 1)
    return _mean(parts, 0) / full if full else float("nan")


def _bootstrap(parts: Sequence[np.ndarray[Any, Any]], of: Statistic, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of ``of``, items resampled inside each part."""
    generator = np.random.default_rng(0)
    values = [of([part[generator.integers(len(part), size=len(part))] for part in parts]) for _ in range(_RESAMPLES)]
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def table(records: Sequence[Mapping[str, Any]], baseline: str | None = None) -> str:
    """`retained` as a Markdown table. *changed* has in brackets what became better and worse."""
    head = ["system", "score", "kept (bound)", "changed (better, worse)", "KL", "median", "p95", "ratio", "items"]
    if baseline:
        head.insert(7, f"KL minus {baseline}")
    lines = [head, ["---"] * len(head)]
    for r in records:
        low, high = r["kl_interval"]
        cells = [
            r["system"].replace("|", "\\|"),
            f"{r['score']:.3f}",
            f"{r['kept']:.1%} ({r['kept_bound']:.1%})",
            f"{r['changed']:.0%} ({r['better']:.0%}, {r['worse']:.0%})",
            f"{r['kl']:.3f} [{low:.3f}, {high:.3f}]",
            f"{r['kl_median']:.3f}",
            f"{r['kl_p95']:.3f}",
            f"{r['ratio']:.3f}" if r["system"] != "full" else "–",
            str(sum(r["items"].values())),
        ]
        if baseline:
            low, high = r["kl_difference_interval"]
            decided = "" if low > 0 or high < 0 else ", undecided"
            cells.insert(7, f"{r['kl_difference']:+.3f} [{low:+.3f}, {high:+.3f}]{decided}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
