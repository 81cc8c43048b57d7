"""Published claims, and the goals of `auto`, checked against rows: tables for `results.py`.

Papers measured with larger models, other data and often a ratio of 0.2. So this shows whether a claim carries over, not
whether it holds there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from analyses import table
from cacheclip_eval import paired, rows

Scores = Mapping[str, Mapping[tuple[str, str], rows.Row]]
"""The rows of each system, by data set and item."""

AUTOS = ("auto:context=prompts", "auto:context=use")


@dataclass(frozen=True)
class Claim:
    """``system`` scores at least ``share`` of what ``other`` does, on the sets whose names begin with ``sets``."""

    source: str
    words: str
    system: str
    other: str
    share: float = 1.0
    sets: str = ""


CACHEBLEND, EPIC, CACHECLIP, PROPHETKV = "cacheblend@0.15", "epic@0.15", "cacheclip@0.15", "prophetkv@0.15"
BLEND_PAPER, CLIP_PAPER = "CacheBlend, arXiv 2405.16444", "CacheClip v2, arXiv 2510.10129"
STUDY, PROPHET_PAPER = "the study, arXiv 2603.20218", "ProphetKV, arXiv 2602.02579"
CLAIMS = [
    Claim(BLEND_PAPER, "better than plain reuse", CACHEBLEND, "naive"),
    Claim(BLEND_PAPER, "F1 within 0.01 to 0.03 of full prefill's (here: 97 %)", CACHEBLEND, "full", 0.97),
    Claim("EPIC, arXiv 2410.15332", "negligible loss (here: 97 %), 16 tokens a chunk", "legolink@0.15", "full", 0.97),
    Claim(STUDY, "EPIC on par with CacheBlend or better", EPIC, CACHEBLEND),
    Claim(CLIP_PAPER, "better than CacheBlend on needles", CACHECLIP, CACHEBLEND, sets="ruler"),
    Claim(CLIP_PAPER, "better than CacheBlend", CACHECLIP, CACHEBLEND),
    Claim(CLIP_PAPER, "better than APE", CACHECLIP, "ape"),
    Claim(CLIP_PAPER, "85 % of full prefill's on needles", CACHECLIP, "full", 0.85, sets="ruler"),
    Claim(CLIP_PAPER, "91 % of full prefill's on LongBench", CACHECLIP, "full", 0.91),
    Claim("DroidSpeak, arXiv 2411.02820", "negligible loss (here: 97 %)", "droidspeak@0.15", "full", 0.97),
    Claim(STUDY, "DroidSpeak worse than CacheBlend", CACHEBLEND, "droidspeak@0.15"),
    Claim("APE, arXiv 2502.05431", "98 % of full prefill's", "ape", "full", 0.98),
    Claim(STUDY, "APE above plain reuse", "ape", "naive"),
    Claim(STUDY, "PSR above CacheBlend", "psr@0.15", CACHEBLEND),
    Claim(STUDY, "PSR above APE", "psr@0.15", "ape"),
    Claim("Cache-Craft, arXiv 2502.15734", "90 % of full prefill's at 30 %", "cachecraft@0.15", "full", 0.9),
    Claim("FusionRAG, arXiv 2601.12904", "selection above CacheBlend", "fusionrag_selection@0.15", CACHEBLEND),
    Claim(PROPHET_PAPER, "96 % of full prefill's or more, at 20 %", PROPHETKV, "full", 0.96),
    Claim(PROPHET_PAPER, "better than CacheBlend", PROPHETKV, CACHEBLEND),
    Claim(PROPHET_PAPER, "better than EPIC", PROPHETKV, EPIC),
    Claim("InfoFlow, arXiv 2603.05353", "better than CacheBlend", "infoflow@0.15", CACHEBLEND),
    Claim(
        "InfoFlow, arXiv 2603.05353",
        "better still with chunks reordered",
        "infoflow@0.15:reorder=True",
        "infoflow@0.15",
    ),
]


def by_system(path: Path) -> Scores:
    found: dict[str, dict[tuple[str, str], rows.Row]] = {}
    for (data, item, system), row in rows.read(path).items():
        if "error" not in row:
            found.setdefault(system, {})[data, item] = row
    return found


def pairs(
    scores: Scores, system: str, other: str, sets: str = "", name: str = "score"
) -> tuple[list[float], list[float]]:
    """The scores (or another measure) of both systems on the items that both have answered."""
    mine, others = scores.get(system, {}), scores.get(other, {})
    items = [item for item in mine if item in others and item[0].startswith(sets)]
    return [mine[item][name] for item in items], [others[item][name] for item in items]


def published(scores: Scores) -> str:
    """A Markdown table of claims. A claim holds, or does not, if the interval of ``score - share * other's`` excludes
    0. For two methods, the KL column says which one is closer to full prefill.
    """
    lines = []
    for claim in CLAIMS:
        mine, others = pairs(scores, claim.system, claim.other, claim.sets)
        if not mine:
            continue
        gap = paired(mine, [claim.share * score for score in others])
        so = "undecided" if not gap.found else "holds" if gap.low > 0 else "**does not hold**"
        seen = f"`{claim.system}` {mean(mine):.3f}, `{claim.other}` {mean(others):.3f}"
        if claim.other == "full":
            seen += f" ({mean(mine) / mean(others):.0%})"
        away = "" if claim.other == "full" else _closer(*pairs(scores, claim.system, claim.other, claim.sets, "kl"))
        lines.append([claim.source, claim.words, seen, f"{so} [{gap.low:+.3f}, {gap.high:+.3f}]", away])
    return table(["source", "says", "here", "so", "KL"], lines)


def _closer(mine: list[float], others: list[float]) -> str:
    gap = paired(mine, others)
    so = "undecided" if not gap.found else "closer" if gap.high < 0 else "**further off**"
    return f"{so} [{gap.low:+.3f}, {gap.high:+.3f}]"


def aims(scores: Scores, auto: str) -> str:
    """A Markdown table of the goals of `auto`, over the sets it has answered, with equal weights."""
    sets = list(dict.fromkeys(data for data, _ in scores[auto]))

    def over(system: str, name: str) -> float:
        return mean(mean(row[name] for (data, _), row in scores[system].items() if data == one) for one in sets)

    score, full, ratio, kl = over(auto, "score"), over("full", "score"), over(auto, "ratio"), over(auto, "kl")
    rivals = [name for name in scores if name != "full" and "context=" not in name and not name.startswith("auto")]
    gaps = {(name, one): paired(*pairs(scores, name, auto, one)) for name in rivals for one in sets}
    ahead = [f"`{name}` on {one}" for (name, one), gap in gaps.items() if gap.found and gap.low > 0]
    aims = [
        ("at least 98 % of full prefill's score", f"{score / full:.1%}", score >= 0.98 * full),
        ("a mean ratio of at most 0.1", f"{ratio:.4f}", ratio <= 0.1),
        ("KL at most half of CacheClip's", f"{kl:.3f} of {over(CACHECLIP, 'kl'):.3f}", kl <= over(CACHECLIP, "kl") / 2),
        (
            "KL at most half of CacheBlend's",
            f"{kl:.3f} of {over(CACHEBLEND, 'kl'):.3f}",
            kl <= over(CACHEBLEND, "kl") / 2,
        ),
        ("on no set behind a published method by more than the interval", ", ".join(ahead) or "behind none", not ahead),
    ]
    lines = ([aim, seen, "met" if met else "**missed**"] for aim, seen, met in aims)
    return table([f"`{auto}`, {len(sets)} sets", "here", ""], lines)
