"""Passages in another order, so that a prefix cache finds more: what is counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from reordering import PassageTree, shares


def test_the_chain_with_most_characters_is_put_in_front() -> None:
    tree = PassageTree()
    tree.add(["a", "b", "c"])
    tree.add(["dd", "b"])
    assert tree.longest(frozenset(["b", "dd", "a", "c"])) == ["a", "b", "c"]  # of three characters, as the other one
    assert tree.longest(frozenset(["b", "dd"])) == ["dd", "b"]
    assert tree.longest(frozenset(["b", "c"])) == []  # nothing began with either


def test_reordering_finds_what_stands_elsewhere() -> None:
    # Ten characters a prompt; the second has two passages of the first, in another order and behind a new one.
    seen, found, moved = shares([["aaaa", "bbb", "ccc"], ["ddd", "bbb", "aaaa"]])
    assert (seen, found, moved) == pytest.approx((7 / 20, 0.0, 7 / 20))
    again = shares([["aaaa", "bbb", "ccc"], ["aaaa", "ccc", "bbb"]])
    assert again == pytest.approx((0.5, 4 / 20, 0.5))
