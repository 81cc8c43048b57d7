"""Systems over the pooled items of all sets, each compared with another one: a table for `results.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import claims
from analyses import table
from cacheclip_eval import paired


def pooled(rows: Path, against: Callable[[str], str]) -> str:
    """A Markdown table with one row per system, over the items that all systems have answered, with equal weights.

    The last column is the mean difference in KL, with its interval, from the system ``against(label)`` on the same
    items.
    """
    scores = claims.by_system(rows)
    items = set.intersection(*map(set, scores.values()))
    scores = {system: {item: row for item, row in mine.items() if item in items} for system, mine in scores.items()}
    lines = []
    for system, mine in scores.items():
        means = {name: mean(row[name] for row in mine.values()) for name in ("score", "agree", "kl")}
        line = [system, str(len(mine)), *(f"{value:.3f}" for value in means.values())]
        line.append(f"{median(row['kl'] for row in mine.values()):.3f}")
        other = against(system)
        if system in (other, "full") or other not in scores:
            line.append("–")
        else:
            gap = paired(*claims.pairs(scores, system, other, name="kl"))
            bounds = f"[{gap.low:+.3f}, {gap.high:+.3f}]"
            line.append(f"{gap.difference:+.3f} {bounds}" if gap.found else f"none {bounds}")
        lines.append(line)
    return table(["system", "items", "score", "agree", "KL", "median", "KL, difference"], lines)
