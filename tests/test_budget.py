"""The budget: exactly as many tokens as it allows, whole groups before single ones."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cacheclip_rag.methods.select.budget import top, top_groups


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine, torch's threads wait for each other far longer than these little sums take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def chunks(*sizes: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def best(scores: list[float], budget: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:budget])


def spelled_out(scores: list[float], groups: list[int], budget: int, width: int, threshold: int) -> list[int]:
    """The definition of `windows`, one token at a time."""
    if width <= 1:
        return best(scores, budget)
    candidates = set(best(scores, budget))
    priority: dict[int, float] = {}
    start = 0
    for _, members in groupby(groups):
        stop = start + len(list(members))
        size = min(width, stop - start)
        for first in range(start, stop - size + 1):
            window = range(first, first + size)
            if len(candidates.intersection(window)) >= min(threshold, size):
                mean = float(np.float32(sum(scores[i] for i in window)) / np.float32(size))
                for i in window:
                    priority[i] = max(priority.get(i, mean), mean)
        start = stop

    def rank(i: int) -> tuple[bool, float, int]:
        return (i not in priority, -priority.get(i, scores[i]), i)

    return sorted(sorted(range(len(scores)), key=rank)[:budget])


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], list[int], int, int, int]:
    sizes = draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    count = sum(sizes)
    scores = draw(st.lists(st.integers(0, 12).map(float), min_size=count, max_size=count))
    numbers = draw(st.permutations(range(len(sizes))))  # chunks may be numbered in any order
    groups = [number for number, size in zip(numbers, sizes, strict=True) for _ in range(size)]
    return scores, groups, draw(st.integers(0, count + 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))


# ---- top ---------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-3, 3).map(float), max_size=40), st.integers(0, 45))
def test_top_takes_the_highest_and_of_equal_ones_the_earlier(scores: list[float], budget: int) -> None:
    assert top(tensor(scores), budget).tolist() == best(scores, budget)


def test_top_of_many_equal_scores_is_the_beginning() -> None:
    assert top(torch.zeros(100_000), 1234).tolist() == list(range(1234))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_top_takes_any_kind_of_number(dtype: torch.dtype) -> None:
    assert top(torch.tensor([1, 3, -float("inf"), 2, 3], dtype=dtype), 3).tolist() == [1, 3, 4]


# ---- windows -----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(cases())
def test_windows_are_chosen_as_defined(case: tuple[list[float], list[int], int, int, int]) -> None:
    scores, groups, budget, width, threshold = case
    chosen = top_groups(tensor(scores), torch.tensor(groups), budget, width, threshold)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == spelled_out(scores, groups, budget, width, threshold)


@settings(max_examples=200, deadline=None)
@given(cases(), st.floats(1e-6, 1e6))
def test_the_budget_is_met_exactly(case: tuple[list[float], list[int], int, int, int], scale: float) -> None:
    scores, groups, budget, width, threshold = case
    chosen = top_groups(tensor(scores) * scale, torch.tensor(groups), budget, width, threshold)
    assert len(chosen) == min(budget, len(scores))
    assert (chosen.diff() > 0).all(), "sorted, none twice"
    assert len(chosen) == 0 or (int(chosen[0]) >= 0 and int(chosen[-1]) < len(scores))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_with_a_threshold_of_one_every_choice_is_within_reach_of_a_candidate(
    case: tuple[list[float], list[int], int, int, int],
) -> None:
    # The candidates all lie in windows then, so nothing is left for single tokens: whatever is chosen is in a window
    # with a candidate, that is, fewer than `width` tokens away from one of its own chunk.
    scores, groups, budget, width, _ = case
    candidates = best(scores, budget)
    for i in top_groups(tensor(scores), torch.tensor(groups), budget, width, 1).tolist():
        assert any(abs(i - c) < width and groups[i] == groups[c] for c in candidates)


def test_a_window_with_enough_candidates_is_taken_whole_before_single_tokens() -> None:
    scores = torch.zeros(40)
    scores[[8, 9, 10, 12, 15]] = 2.0  # five of the window 8..15
    scores[[0, 20, 25, 30, 39]] = 9.0  # better ones, but alone
    assert top_groups(scores, chunks(40), 10, size=8, threshold=5).tolist() == [0, 8, 9, 10, 11, 12, 13, 14, 15, 20]
    assert top_groups(scores, chunks(40), 10, size=8, threshold=6).tolist() == [0, 8, 9, 10, 12, 15, 20, 25, 30, 39]


def test_of_several_windows_the_one_with_the_best_mean_goes_first() -> None:
    scores = torch.zeros(40)
    scores[4:8], scores[20:24], scores[30:34] = 3.0, 5.0, 4.0
    chosen = top_groups(scores, chunks(40), 12, size=4, threshold=4)
    assert chosen.tolist() == [*range(4, 8), *range(20, 24), *range(30, 34)]
    scores[8:16] = 2.0
    assert set(range(20, 24)) <= set(top_groups(scores, chunks(40), 5, size=4, threshold=4).tolist())


def test_windows_never_cross_a_border_between_chunks() -> None:
    scores = torch.zeros(32)
    scores[12:20] = 1.0  # four at the end of one chunk, four at the beginning of the next
    scores[[2, 28]] = 0.5
    across = top_groups(scores, chunks(32), 10, size=8, threshold=5)
    apart = top_groups(scores, chunks(16, 16), 10, size=8, threshold=5)
    assert 2 not in across.tolist() and 28 not in across.tolist()  # one window, then its overlapping neighbours
    assert apart.tolist() == [2, *range(12, 20), 28]  # no window at all: single tokens


def test_a_chunk_shorter_than_a_window_counts_as_one() -> None:
    scores = torch.zeros(23)
    scores[20], scores[21] = 1.0, 1.0  # two of the three tokens of the second chunk
    scores[[0, 5, 10, 15]] = 2.0
    assert 22 in top_groups(scores, chunks(20, 3), 6, size=8, threshold=2).tolist()
    assert 22 not in top_groups(scores, chunks(20, 3), 6, size=8, threshold=3).tolist()


@pytest.mark.parametrize("budget", [0, 1, 6, 7, 100])
@pytest.mark.parametrize("width", [1, 2, 8, 100])
def test_budgets_and_widths_at_the_limits(budget: int, width: int) -> None:
    scores = tensor([3, 1, 2, 9, 9, 0, 4])
    chosen = top_groups(scores, chunks(4, 3), budget, width, threshold=5).tolist()
    assert len(chosen) == min(budget, 7)
    if width == 1:
        assert chosen == top(scores, budget).tolist()
    if budget >= 7:
        assert chosen == list(range(7))


def test_nothing_to_choose_from() -> None:
    assert top_groups(torch.zeros(0), torch.zeros(0, dtype=torch.long), 0).tolist() == []
    assert top_groups(torch.zeros(0), torch.zeros(0, dtype=torch.long), 5).tolist() == []


@pytest.mark.parametrize("power", [-40, -30, -20, -10, 10, 40])
def test_only_the_order_of_scores_counts_and_not_their_size(power: int) -> None:
    # Attention spread over thousands of tokens is small: 1e-5 for a good one, 1e-8 for most.
    generator = torch.Generator().manual_seed(0)
    scores, groups = torch.rand(400, generator=generator), chunks(*[40] * 10)
    expected = top_groups(scores, groups, 80, size=8, threshold=3)
    assert not torch.equal(expected, top(scores, 80)), "windows do matter here"
    assert torch.equal(top_groups(scores * 2.0**power, groups, 80, size=8, threshold=3), expected)


def test_a_single_huge_score_does_not_blur_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, groups = torch.rand(400, generator=generator) * 1e-4, chunks(*[40] * 10)
    expected = top_groups(scores, groups, 80, size=8, threshold=3).tolist()
    sink = torch.cat([tensor([1e4]), scores])  # an attention sink, in a chunk of its own
    chosen = top_groups(sink, torch.cat([torch.tensor([10]), groups]), 81, size=8, threshold=3)
    assert chosen.tolist() == [0, *(i + 1 for i in expected)]


def test_scores_are_not_changed() -> None:
    scores, groups = torch.rand(50), chunks(25, 25)
    before = scores.clone()
    top_groups(scores, groups, 20)
    assert torch.equal(scores, before)
