"""What every harness counts: what was tried, and what came of it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

WORDS = [
    "harbour",
    "clerk",
    "parcel",
    "warehouse",
    "pilot",
    "ferry",
    "herring",
    "timber",
    "lantern",
    "bridge",
    "engineer",
    "turntable",
    "memoir",
    "orchard",
    "quince",
    "bakery",
    "starter",
    "observatory",
    "telegram",
    "director",
    "valley",
    "railway",
    "bather",
    "mason",
    "printer",
    "theatre",
    "brewery",
    "council",
    "museum",
    "garden",
    "ledger",
    "anchor",
    "chapel",
    "kiln",
    "weaver",
    "copper",
    "violin",
    "granite",
    "meadow",
    "sluice",
    "beacon",
    "saddle",
    "glazier",
    "almanac",
]


@dataclass
class Counts:
    """``done``: how often each thing was tried. ``failed`` describes everything that must not happen."""

    done: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.failed

    def expect(self, condition: object, failure: str) -> None:
        if not condition:
            self.failed.append(failure)

    def __str__(self) -> str:
        text = ", ".join(f"{count:,} {name}" for name, count in self.done.items())
        return f"{text}; failed: {len(self.failed)}" + "".join(f"\n    {failure}" for failure in self.failed[:10])


def passage(number: int, name: str = "") -> str:
    """A text that follows from its number and ``name`` and has no stretch worth the name in common with any other."""
    name = name or f"entry-{number:06d}"
    rng = random.Random(name)
    return f"{name}: {' '.join(rng.choice(WORDS) + rng.choice(('', '', ',')) for _ in range(24))} {number}."
