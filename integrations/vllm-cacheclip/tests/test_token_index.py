"""Recognition by token ids: what is found is there, as much of it as can be, in work linear in the prompt."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
from cacheclip_vllm import index as index_module
from cacheclip_vllm.index import ANCHOR, BORDER, MAX_CANDIDATES, Match, TokenIndex, window_hashes
from hypothesis import given, settings
from hypothesis import strategies as st

CERTAIN = 2 * ANCHOR - 1
"""A common stretch of as many tokens contains an anchor wherever it begins."""


def index_of(chunks: dict[str, list[int]]) -> TokenIndex:
    index = TokenIndex()
    for name, ids in chunks.items():
        index.add(name, ids)
    return index


def tokens(seed: int, count: int, vocabulary: int = 50_000) -> list[int]:
    return random.Random(seed).choices(range(vocabulary), k=count)


def common(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def anchors(ids: list[int]) -> range:
    """Where a chunk has anchors: behind the two tokens that its border may cost, if it is long enough."""
    return range(max(0, min(BORDER, len(ids) - ANCHOR)), len(ids) - ANCHOR + 1, ANCHOR)


def greedy(chunks: dict[str, list[int]], prompt: list[int]) -> list[Match]:
    """What `TokenIndex.find` says it returns, token by token."""
    found: list[Match] = []
    taken = 0
    for row in range(len(prompt) - ANCHOR + 1):
        if row < taken:
            continue
        best: Match | None = None
        for name, ids in chunks.items():
            for offset in anchors(ids):
                if prompt[row : row + ANCHOR] != ids[offset : offset + ANCHOR]:
                    continue
                back = common(prompt[taken:row][::-1], ids[:offset][::-1])
                length = back + common(prompt[row:], ids[offset:])
                if best is None or (length, back - offset) > (best.length, -best.offset):
                    best = Match(row - back, name, offset - back, length)
        if best is not None:
            found.append(best)
            taken = best.row + best.length
    return found


@st.composite
def chunks_and_prompt(draw: st.DrawFn) -> tuple[dict[str, list[int]], list[int]]:
    """Chunks with much in common, and a prompt of pieces of them with other tokens in between."""
    vocabulary = draw(st.sampled_from([1, 2, 40]))
    some = st.lists(st.integers(0, vocabulary), max_size=70)
    pieces = draw(st.lists(some, min_size=1, max_size=5))
    chosen = st.lists(st.sampled_from(pieces), max_size=4).map(
        lambda parts: [token for part in parts for token in part]
    )
    chunks = {f"c{number}": ids for number, ids in enumerate(draw(st.lists(chosen, min_size=1, max_size=5)))}
    stretches = st.sampled_from([*chunks.values()]).flatmap(
        lambda ids: st.tuples(st.integers(0, len(ids)), st.integers(0, len(ids))).map(
            lambda ends: ids[min(ends) : max(ends)]
        )
    )
    prompt = draw(st.lists(st.one_of(stretches, st.sampled_from([*chunks.values()]), some), max_size=8))
    return chunks, [token for part in prompt for token in part]


# ---- what is found ---------------------------------------------------------------------------------------------------


@given(chunks_and_prompt())
@settings(deadline=None)
def test_matches_are_equal_tokens_disjoint_in_order_and_cannot_grow(
    case: tuple[dict[str, list[int]], list[int]],
) -> None:
    chunks, prompt = case
    taken = 0
    for match in index_of(chunks).find(prompt):
        ids, end = chunks[match.name], match.row + match.length
        assert match.length >= ANCHOR
        assert prompt[match.row : end] == ids[match.offset : match.offset + match.length]
        assert match.row >= taken
        before = match.row > taken and match.offset > 0
        assert not (before and prompt[match.row - 1] == ids[match.offset - 1])
        behind = end < len(prompt) and match.offset + match.length < len(ids)
        assert not (behind and prompt[end] == ids[match.offset + match.length])
        taken = end


@given(chunks_and_prompt())
@settings(deadline=None)
def test_the_longest_match_from_the_left_is_taken_at_each_place(case: tuple[dict[str, list[int]], list[int]]) -> None:
    """As the definition, token by token; of equally long matches the one nearest to its chunk's start."""
    chunks, prompt = case
    windows = [tuple(ids[at : at + ANCHOR]) for ids in chunks.values() for at in anchors(ids)]
    found = index_of(chunks).find(prompt)
    if max((windows.count(window) for window in set(windows)), default=0) <= MAX_CANDIDATES:
        assert found == greedy(chunks, prompt)


@given(chunks_and_prompt())
@settings(deadline=None)
def test_no_long_stretch_of_a_chunk_is_missed(case: tuple[dict[str, list[int]], list[int]]) -> None:
    chunks, prompt = case
    known = {tuple(ids[at : at + CERTAIN]) for ids in chunks.values() for at in range(len(ids) - CERTAIN + 1)}
    covered = {row for match in index_of(chunks).find(prompt) for row in range(match.row, match.row + match.length)}
    for row in range(len(prompt) - CERTAIN + 1):
        if tuple(prompt[row : row + CERTAIN]) in known:
            assert covered & set(range(row, row + CERTAIN))


@pytest.mark.parametrize("at", [0, 1, ANCHOR - 1, ANCHOR, 5 * ANCHOR + 3])
@pytest.mark.parametrize("cut", [0, 1, 2, ANCHOR + 1])
def test_a_chunk_is_found_at_any_row_without_its_borders(at: int, cut: int) -> None:
    """The text around a chunk may change its first and last tokens."""
    chunk = tokens(0, 100)
    prompt = [*tokens(1, at), *chunk[cut : len(chunk) - cut], *tokens(2, 9)]
    assert index_of({"a": chunk}).find(prompt) == [Match(at, "a", cut, 100 - 2 * cut)]


@pytest.mark.parametrize("count", range(ANCHOR + 2 * BORDER, 3 * ANCHOR))
def test_a_chunk_of_twenty_tokens_is_found_whatever_its_borders_became(count: int) -> None:
    chunk = tokens(count, count)
    prompt = [*tokens(1, 9), *chunk[BORDER:-BORDER], *tokens(2, 9)]
    assert index_of({"a": chunk}).find(prompt) == [Match(9, "a", BORDER, count - 2 * BORDER)]


def test_a_token_that_differs_parts_a_chunk_in_two_matches() -> None:
    chunk = tokens(0, 100)
    prompt = [*chunk[:50], -1, *chunk[51:]]
    assert index_of({"a": chunk}).find(prompt) == [Match(0, "a", 0, 50), Match(51, "a", 51, 49)]


def test_of_chunks_that_share_their_beginning_the_one_that_goes_on_is_found() -> None:
    head = tokens(0, 40)
    chunks = {name: head + tokens(seed, 40) for seed, name in enumerate("abc", start=1)}
    index = index_of(chunks)
    for name, ids in chunks.items():
        assert index.find([7, *ids, 7]) == [Match(1, name, 0, 80)]


def test_a_chunk_shorter_than_an_anchor_is_known_but_not_found() -> None:
    index = index_of({"short": tokens(0, ANCHOR - 1), "just": tokens(1, ANCHOR), "none": []})
    assert len(index) == 3 and "short" in index
    assert index.find(tokens(0, ANCHOR - 1) * 5) == []
    assert index.find([5, *tokens(1, ANCHOR)]) == [Match(1, "just", 0, ANCHOR)]
    index.remove("short")
    index.remove("none")
    assert index.names() == {"just"}


@pytest.mark.parametrize("prompt", [[], [1], tokens(0, ANCHOR - 1)])
def test_a_prompt_shorter_than_an_anchor_has_no_match(prompt: list[int]) -> None:
    assert index_of({"a": tokens(0, 60)}).find(prompt) == []
    assert TokenIndex().find(prompt) == []


def test_hashes_only_nominate(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one hash for all windows, still nothing is found that is not there."""
    monkeypatch.setattr(index_module, "window_hashes", lambda ids: np.zeros(max(0, len(ids) - ANCHOR + 1), np.uint64))
    chunk = tokens(0, 60)
    assert index_of({"a": chunk}).find([*tokens(1, 40), *chunk, *tokens(2, 40)]) == [Match(40, "a", 0, 60)]
    assert index_of({"a": chunk}).find(tokens(3, 500)) == []


def test_a_window_is_hashed_by_its_own_tokens_in_their_order() -> None:
    ids = np.array(tokens(0, 200), dtype=np.int64)
    hashes = window_hashes(ids)
    assert len(hashes) == 200 - ANCHOR + 1
    assert all(hashes[row] == window_hashes(ids[row : row + ANCHOR])[0] for row in range(len(hashes)))
    assert hashes[0] != window_hashes(ids[:ANCHOR][::-1].copy())[0]
    assert len(set(hashes.tolist())) == len(hashes)


# ---- what is known ---------------------------------------------------------------------------------------------------

POOL = {f"c{number}": tokens(number % 5, 20 + 9 * number) for number in range(8)}
"""Some begin with the same tokens."""
STEPS = st.lists(st.tuples(st.sampled_from(["add", "remove", "find"]), st.sampled_from(sorted(POOL))), max_size=40)


@given(STEPS)
@settings(deadline=None)
def test_after_any_additions_and_removals_it_is_as_made_anew(steps: list[tuple[str, str]]) -> None:
    index, known = TokenIndex(), dict[str, list[int]]()
    prompt = [token for ids in POOL.values() for token in (*ids, 3)]
    for step, name in steps:
        if step == "add":
            index.add(name, POOL[name])
            known.setdefault(name, POOL[name])
        elif step == "remove":
            index.remove(name)
            known.pop(name, None)
        else:
            assert index.find(prompt) == index_of(known).find(prompt)
    assert index.names() == set(known) and len(index) == len(known)
    assert index.find(prompt) == index_of(known).find(prompt)


def test_a_name_keeps_its_tokens_until_it_is_removed() -> None:
    index = index_of({"a": tokens(0, 60)})
    index.add("a", tokens(1, 60))
    assert index.find(tokens(1, 60)) == [] and index.ids("a").tolist() == tokens(0, 60)
    index.remove("a")
    index.add("a", tokens(1, 60))
    assert index.find(tokens(0, 60)) == [] and index.find(tokens(1, 60)) == [Match(0, "a", 0, 60)]


def test_what_comes_and_goes_leaves_nothing_behind() -> None:
    """A server that runs for months adds and removes chunks all the time."""
    index = TokenIndex()
    for time in range(50):
        index.add(f"c{time}", tokens(time, 200))
        index.find(tokens(time, 40))
        index.remove(f"c{time}")
    assert index.find(tokens(0, 40)) == []
    assert len(pickle.dumps(index)) < len(pickle.dumps(TokenIndex())) + 50


# ---- work ------------------------------------------------------------------------------------------------------------

BLOCKS = [tokens(number, ANCHOR, 4) for number in range(20)]
RNG = random.Random(0)


def joined(blocks: list[list[int]]) -> list[int]:
    return [token for block in blocks for token in block]


HOSTILE: dict[str, tuple[list[list[int]], list[int]]] = {
    "one token": ([[1] * 20_000], [1]),
    "one token, many lengths": ([[1] * (100 + n) for n in range(500)], [1]),
    "one token, and another now and then": ([[1] * 20_000], [1] * 40 + [2]),
    "anchors that go on otherwise": ([[*BLOCKS[0], *tokens(n, 5000)] for n in range(100)], [*BLOCKS[0], 9]),
    "blocks in any order": (
        [joined(RNG.choices(BLOCKS, k=40)) for _ in range(100)],
        joined(RNG.choices(BLOCKS, k=1000)),
    ),
    "a chunk's anchors in another order": ([joined(BLOCKS * 100)], joined(BLOCKS[::-1])),
    "near-duplicates": ([[*tokens(0, 400), n, *tokens(1, 20)] for n in range(500)], [*tokens(0, 400), -1]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_work_is_linear_in_the_prompt_whatever_the_tokens(name: str) -> None:
    chunks, unit = HOSTILE[name]
    index = index_of({str(number): ids for number, ids in enumerate(chunks)})
    for count in (4_000, 16_000):
        index.find((unit * (count // len(unit) + 1))[:count])
        assert index.compared <= 10 * MAX_CANDIDATES * count
