"""How much of the context a prefix cache finds if the passages of a prompt may be put in another order.

    python benchmarks/reordering.py DATA

After ContextPilot's abstract (2511.03475): every prompt begins with the longest chain of its own passages that earlier
prompts began with, and the others follow as retrieved. No model runs: shares are counted in characters of passages, on
the choosing half of each set in the order of its file, with a cache that forgets nothing. KV found so is exact for the
new order.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from halves import half

QUESTIONS = 200
"""Of each set at most."""


@dataclass
class PassageTree:
    """The orders of earlier prompts: what may follow each chain of passages."""

    after: dict[str, PassageTree] = field(default_factory=dict)

    def begun(self, passages: Sequence[str]) -> list[str]:
        """The longest beginning (passages) of these that an earlier prompt had in this order."""
        known, tree = list[str](), self
        for passage in passages:
            if passage not in tree.after:
                break
            known.append(passage)
            tree = tree.after[passage]
        return known

    def longest(self, passages: frozenset[str]) -> list[str]:
        """The longest chain (characters) of earlier prompts that consists of these passages only."""
        chains = [[first, *tree.longest(passages - {first})] for first, tree in self.after.items() if first in passages]
        return max(chains, key=characters, default=[])

    def add(self, passages: Sequence[str]) -> None:
        tree = self
        for passage in passages:
            tree = tree.after.setdefault(passage, PassageTree())


def characters(passages: Sequence[str]) -> int:
    return sum(map(len, passages))


def shares(prompts: Sequence[Sequence[str]]) -> tuple[float, float, float]:
    """The shares of the context that were in an earlier prompt, that a prefix cache finds in the order retrieved, and
    that it finds after reordering.
    """
    plain, reordered, known = PassageTree(), PassageTree(), set[str]()
    seen = found = moved = 0
    for passages in prompts:
        seen += characters([passage for passage in passages if passage in known])
        found += characters(plain.begun(passages))
        front = reordered.longest(frozenset(passages))
        moved += characters(front)
        plain.add(passages)
        reordered.add([*front, *(passage for passage in passages if passage not in front)])
        known.update(passages)
    total = sum(map(characters, prompts))
    return seen / total, found / total, moved / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    args = parser.parse_args()
    print("| set | questions | in an earlier prompt | found, as retrieved | found, reordered |\n|---|---|---|---|---|")
    for source in half(args.data, "choosing"):
        items = [item for item in source.all() if source.ids is None or item.id in source.ids][:QUESTIONS]
        prompts = [list(dict.fromkeys(passage.chunk for passage in item.passages)) for item in items]
        print(f"| {source.name} | {len(items)} | {' | '.join(f'{share:.1%}' for share in shares(prompts))} |")


if __name__ == "__main__":
    main()
