"""The decision of a pilot, on made-up numbers: which setting is taken, and what is left undecided."""

from __future__ import annotations

import pytest
from cacheclip_eval.choice import Choice, Tried, choose, verdicts

COUNT = 12
EASY_AND_HARD = [0.01 * (n + 1) ** 2 for n in range(COUNT)]
"""Some questions are hard for every setting; differences are paired, so that this cancels out."""


def tried(setting: str, cost: float, above: float, swing: float = 0.0, count: int = COUNT) -> Tried:
    """A setting whose KL lies ``above`` the questions' own in the mean, a ``swing`` more and less in turn."""
    return Tried(setting, cost, tuple(base + above + (-1) ** n * swing for n, base in enumerate(EASY_AND_HARD[:count])))


def test_the_cheapest_of_those_that_are_as_good_is_taken() -> None:
    found = choose([tried("a", 0.05, 0.5, 0.1), tried("b", 0.1, 0.02, 0.1), tried("c", 0.2, 0.0)])
    assert (found.taken.setting, found.best.setting) == ("b", "c")
    assert [found.verdict(name) for name in "abc"] == ["worse", "undecided", "best"] and found.undecided == ["b"]


def test_the_dearest_is_taken_where_all_others_are_worse() -> None:
    """The spread over questions, which is much wider than the difference, is no excuse: it is the same for both."""
    found = choose([tried("a", 0.05, 0.06, 0.01), tried("b", 0.1, 0.03, 0.01), tried("c", 0.2, 0.0)])
    assert found.taken is found.best and found.best.setting == "c" and found.undecided == []


def test_a_setting_is_not_taken_because_few_questions_prove_nothing() -> None:
    """More than a standard error above the best one it is undecided, and the better one is taken."""
    found = choose([tried("a", 0.05, 0.04, 0.1), tried("b", 0.2, 0.0)])  # a standard error of 0.029
    assert found.differences["a"].low < 0 < found.differences["a"].high
    assert found.verdict("a") == "undecided" and found.taken.setting == "b"


def test_equal_cost_and_equal_kl_keep_the_first() -> None:
    same = [tried("default", 0.0, 0.1), tried("other", 0.0, 0.1)]
    assert choose(same).taken.setting == "default"
    assert choose([same[0], tried("lower", 0.0, 0.0)]).taken.setting == "lower"


def test_few_questions_find_no_difference() -> None:
    found = choose([tried("a", 0.05, 0.5, 0.01, 5), tried("c", 0.2, 0.0, 0.01, 5)])
    assert found.differences["a"].low > 0 and found.verdict("a") == "undecided"


def test_one_setting_is_the_choice_and_none_is_an_error() -> None:
    one = tried("a", 0.1, 0.0)
    assert choose([one]) == Choice(one, one, choose([one]).differences)
    with pytest.raises(ValueError, match="no setting"):
        choose([])


def test_verdicts_that_are_given_together_have_wider_intervals() -> None:
    """A difference that a single comparison finds may be luck among many."""
    mine, other = tried("a", 0.1, 0.0), tried("b", 0.1, 0.033, 0.05)
    alone = verdicts(mine, [other])["b"]
    among = verdicts(mine, [other, *(tried(str(n), 0.1, 0.0, 0.1) for n in range(9))])["b"]
    assert alone.difference == among.difference < 0
    assert alone.found and not among.found
    assert verdicts(mine, []) == {}
