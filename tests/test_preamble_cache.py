"""KV of prompts' beginnings: the longest known one is found, within a number of entries and of bytes."""

from __future__ import annotations

import torch
from threads import join, start
from torch import Tensor

from cacheclip_rag.kv.preamble import WORTH, PreambleCache
from cacheclip_rag.model.canvas import Canvas
from cacheclip_rag.store import LRUCache, MemoryBudget

ROOMY = MemoryBudget(1 << 30)


def canvas(ids: Tensor) -> Canvas:
    """A canvas whose row j holds the number of the token there."""
    made = Canvas(2, 1, 4, len(ids) + 3, dtype=torch.float32, device="cpu")
    rows = ids.float()[None, None, :, None].expand(2, 1, -1, 4)
    made.write(0, rows, -rows)
    return made


def keep(cache: PreambleCache, ids: Tensor, length: int | None = None) -> None:
    cache.keep(ids, len(ids) if length is None else length, canvas(ids))


def longest(cache: PreambleCache, ids: Tensor) -> int:
    """The length of what is found, which has to be the KV of these very tokens."""
    found = cache.longest(ids)
    if found is None:
        return 0
    keys, values = found
    size = keys.shape[2]
    expected = ids[:size].float()[None, None, :, None].expand(2, 1, -1, 4)
    assert torch.equal(keys, expected) and torch.equal(values, -expected)
    return size


def prefix(*parts: range) -> Tensor:
    return torch.tensor([i for part in parts for i in part])


def test_prefixes_that_extend_one_another_are_kept_once_and_within_their_bytes() -> None:
    ids = torch.arange(64)
    one = 2 * 2 * 4 * 4  # bytes of a row on that canvas: keys and values, two layers, four numbers of four bytes
    cache = PreambleCache(MemoryBudget(100 * one))
    for length in (16, 32, 64):
        cache.keep(ids, length, canvas(ids))
    assert cache.nbytes == 64 * one
    found = cache.longest(ids[:20])
    assert found is not None and found[0].shape[2] == 20
    cache.keep(ids + 100, 64, canvas(ids + 100))
    assert cache.nbytes == 64 * one and cache.longest(ids) is None


def test_the_longest_common_prefix_is_found() -> None:
    cache = PreambleCache(ROOMY)
    keep(cache, prefix(range(20)))
    keep(cache, prefix(range(12), range(100, 130)))
    assert longest(cache, prefix(range(20), range(500, 510))) == 20
    assert longest(cache, prefix(range(15), range(500, 510))) == 15
    assert longest(cache, prefix(range(12), range(100, 105), range(7))) == 17
    assert longest(cache, prefix(range(12))) == 12
    assert longest(cache, prefix(range(1, 30))) == 0


def test_only_the_asked_for_rows_of_a_canvas_are_kept() -> None:
    cache = PreambleCache(ROOMY)
    keep(cache, prefix(range(40)), length=10)
    assert longest(cache, prefix(range(40))) == 10


def test_short_prefixes_are_not_worth_it() -> None:
    cache = PreambleCache(ROOMY)
    keep(cache, prefix(range(WORTH - 1)))
    assert longest(cache, prefix(range(WORTH - 1))) == 0
    keep(cache, prefix(range(50)))
    assert longest(cache, prefix(range(WORTH - 1), range(900, 950))) == 0
    assert longest(cache, prefix(range(WORTH), range(900, 950))) == WORTH


def test_what_is_kept_is_a_copy() -> None:
    cache, ids = PreambleCache(ROOMY), prefix(range(20))
    made = canvas(ids)
    cache.keep(ids, 20, made)
    made.keys.zero_()
    made.values.zero_()
    assert longest(cache, ids) == 20


def test_the_prefix_used_longest_ago_is_dropped() -> None:
    cache = PreambleCache(ROOMY, size=3)
    prefixes = [prefix(range(100 * n, 100 * n + 20)) for n in range(5)]
    for ids in prefixes[:3]:
        keep(cache, ids)
    assert longest(cache, prefixes[0]) == 20  # a use
    keep(cache, prefixes[3])
    assert [longest(cache, ids) for ids in prefixes[:4]] == [20, 0, 20, 20]


def test_a_prefix_that_another_one_begins_with_is_not_kept_twice() -> None:
    cache = PreambleCache(ROOMY, size=2)
    other, long = prefix(range(500, 530)), prefix(range(50))
    keep(cache, other)
    keep(cache, long)
    for length in (10, 20, 50):
        keep(cache, long, length)
    assert longest(cache, other) == 30 and longest(cache, long) == 50


def test_prefixes_from_many_threads() -> None:
    cache, errors = PreambleCache(ROOMY, size=4), []

    def work(n: int) -> None:
        try:
            for i in range(60):
                ids = prefix(range(5), range(1000 * (i % 6), 1000 * (i % 6) + 20 + n))
                keep(cache, ids)
                longest(cache, ids)
        except BaseException as error:
            errors.append(error)

    join(*[start(lambda n=n: work(n)) for n in range(6)])  # type: ignore[misc]
    assert not errors
    assert sum(longest(cache, prefix(range(5), range(1000 * i, 1000 * i + 30))) > 5 for i in range(6)) <= 4


def test_preambles_and_chunks_share_one_budget() -> None:
    row = 2 * 2 * 4 * 4  # bytes, as above
    memory = MemoryBudget(100 * row)
    cache, chunks = PreambleCache(memory), LRUCache[str, object](memory, "chunks")
    keep(cache, prefix(range(40)))
    chunks.put("a", object(), 50 * row)
    assert memory.by_kind() == {"chunks": 50 * row, "preambles": 40 * row} and longest(cache, prefix(range(40))) == 40
    chunks.put("b", object(), 20 * row)  # "a" was used before the preamble
    assert "a" not in chunks and longest(cache, prefix(range(40))) == 40
    chunks.put("c", object(), 90 * row)
    assert longest(cache, prefix(range(40))) == 0 and memory.nbytes == 90 * row
    keep(cache, prefix(range(120)))  # more than the budget
    assert cache.nbytes == 0 and memory.by_kind() == {"chunks": 90 * row}
