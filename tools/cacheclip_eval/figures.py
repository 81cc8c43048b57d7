"""Summary statistics of rows: by data set and system, and for the difference of two systems."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from cacheclip_rag.errors import ConfigurationError

from . import rows
from .metrics import bootstrap, normalised_f1, paired
from .rows import Row

MEASURES = ("score", "agree", "kl")
NAIVE = "naive"
"""The label of the system with a normalised F1 of 0."""


def summary(path: str | Path) -> list[dict[str, Any]]:
    """One record per data set and system, JSON-ready; None for values that the rows lack.

    ``score``, ``agree``, ``kl``, ``em``: means over the items that full prefill answered as well, with ``..._interval``
    ``[low, high]`` (bootstrap, 95 %) beside the first three. ``kl_median``: of the same items, because a few items on
    which full prefill itself is uncertain dominate the mean. ``nll``: the mean negative log-likelihood of the right
    answer in nats per token; None where a row lacks it, as older ones do. ``adjusted``: the score over the ``solved``
    items, which full prefill scores above 0 on (arXiv 2603.20218). ``normalised``: see `metrics.normalised_f1`, over
    the items that plain reuse answered as well. ``ratio``: as realised, over items with placed KV. ``ttft``: the median
    over items of time to first token / full prefill's, which was measured when its reference was computed.
    ``bytes_per_token``: stored KV per context token, including the auxiliary model's. ``items``: those counted;
    ``failed``: those that raised; ``fell_back``: those on which reuse was given up, for the request or for a chunk.
    """
    records = []
    for dataset, systems in _by_dataset(path).items():
        full, naive = _good(systems.get("full", {})), _good(systems.get(NAIVE, {}))
        for system, all_rows in systems.items():
            good = {id: row for id, row in _good(all_rows).items() if id in full}
            record: dict[str, Any] = {"dataset": dataset, "system": system, "items": len(good)}
            record["failed"] = sum("error" in row for row in all_rows.values())
            for name in MEASURES:
                values = [row[name] for row in good.values()]
                record |= {name: _mean(values), f"{name}_interval": interval(values)}
            record["kl_median"] = median(row["kl"] for row in good.values()) if good else None
            solved = [row["score"] for id, row in good.items() if full[id]["score"] > 0]
            record |= {"adjusted": _mean(solved), "adjusted_interval": interval(solved), "solved": len(solved)}
            known = _present(good.values(), "nll")
            record["nll"] = _mean(known) if len(known) == len(good) else None
            record["em"] = _mean(row["em"] for row in good.values() if "em" in row)
            record["normalised"] = _normalised(good, naive, full)
            record["ratio"] = None if system == "full" else _mean(_present(good.values(), "ratio"))
            record["ttft"] = _ttft(good, full)
            record["bytes_per_token"] = _bytes_per_token(good.values())
            record["fell_back"] = sum(bool(row.get("fallbacks")) for row in good.values())
            records.append(record)
    return records


def comparison(path: str | Path, baseline: str) -> list[dict[str, Any]]:
    """The differences of every system from the one labelled ``baseline``, by data set, over the items both answered.

    ``score``, ``adjusted`` (over the items that full prefill scores above 0 on), ``agree`` and ``kl`` are records of
    ``difference``, ``interval``, ``items`` and ``found``, which is False where the interval contains 0 or there are too
    few items to tell (see `metrics.Paired`); None without items. Raises ConfigurationError for an unknown baseline.
    """
    by_dataset = _by_dataset(path)
    known = list(dict.fromkeys(system for systems in by_dataset.values() for system in systems))
    if baseline not in known:
        raise ConfigurationError(f'no rows of "{baseline}" to compare with; there are: {", ".join(known)}')
    records = []
    for dataset, systems in by_dataset.items():
        full, base = _good(systems.get("full", {})), _good(systems.get(baseline, {}))
        for system in [system for system in systems if system != baseline]:
            mine = _good(systems[system])
            common = [id for id in mine if id in base]
            solved = [id for id in common if id in full and full[id]["score"] > 0]
            record: dict[str, Any] = {"dataset": dataset, "system": system, "baseline": baseline, "items": len(common)}
            for name in MEASURES:
                record[name] = _difference(mine, base, common, name)
            record["adjusted"] = _difference(mine, base, solved, "score")
            records.append(record)
    return records


def interval(values: Sequence[float]) -> list[float] | None:
    """The bootstrap interval ``[low, high]`` of the mean; None for fewer than two values."""
    low, high = bootstrap(values)
    return None if math.isnan(low) else [low, high]


def _by_dataset(path: str | Path) -> dict[str, dict[str, dict[str, Row]]]:
    """Newest rows by data set, system and item."""
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for (dataset, item, system), row in rows.read(path).items():
        found.setdefault(dataset, {}).setdefault(system, {})[item] = row
    return found


def _good(mine: dict[str, Row]) -> dict[str, Row]:
    return {id: row for id, row in mine.items() if "error" not in row}


def _difference(a: dict[str, Row], b: dict[str, Row], ids: Sequence[str], name: str) -> dict[str, Any] | None:
    if not ids:
        return None
    result = paired([a[id][name] for id in ids], [b[id][name] for id in ids])
    bounds = None if math.isnan(result.low) else [result.low, result.high]
    return {"difference": result.difference, "interval": bounds, "items": result.items, "found": result.found}


def _normalised(mine: dict[str, Row], naive: dict[str, Row], full: dict[str, Row]) -> float | None:
    ids = [id for id in mine if id in naive]
    if not ids:
        return None
    score, low, high = (mean(group[id]["score"] for id in ids) for group in (mine, naive, full))
    return normalised_f1(score, low, high) if high > low else None  # without a gap, nothing comes back


def _ttft(mine: dict[str, Row], full: dict[str, Row]) -> float | None:
    ratios = [row["ttft"] / full[id]["ttft"] for id, row in mine.items() if row.get("ttft") and full[id].get("ttft")]
    return median(ratios) if ratios else None


def _bytes_per_token(mine: Iterable[Row]) -> float | None:
    known = [row for row in mine if row.get("stored_tokens") and row.get("auxiliary_bytes") is not None]
    tokens = sum(row["stored_tokens"] for row in known)
    return sum(row["stored_bytes"] + row["auxiliary_bytes"] for row in known) / tokens if tokens else None


def _present(mine: Iterable[Row], name: str) -> list[float]:
    return [row[name] for row in mine if row.get(name) is not None]


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return mean(values) if values else None
