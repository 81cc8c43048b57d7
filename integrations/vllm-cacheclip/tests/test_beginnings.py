"""The exact beginnings of prompts that a worker keeps: the longest common one, told by token ids and salt."""

from __future__ import annotations

import numpy as np
import torch
from cacheclip_vllm.beginnings import ROWS, Beginnings
from torch import Tensor


def kv(ids: np.ndarray) -> Tensor:
    """KV that says which tokens it is of: ``[2, 1, n, 1]``."""
    return torch.from_numpy(ids).float().reshape(1, 1, -1, 1).expand(2, 1, -1, 1)


def kept(*prompts: list[int], salt: str = "") -> Beginnings:
    made = Beginnings()
    for ids in map(np.array, prompts):
        made.keep(salt, ids, kv(ids), -kv(ids))
    return made


def found(beginnings: Beginnings, ids: list[int], salt: str = "") -> list[int]:
    got = beginnings.find(salt, np.array(ids))
    if got is None:
        return []
    assert torch.equal(got[1], -got[0])
    return got[0][0, 0, :, 0].int().tolist()


def test_the_longest_common_beginning_is_found() -> None:
    beginnings = kept([1, 2, 3, 4], [1, 2, 5, 6, 7])
    assert found(beginnings, [1, 2, 3, 9]) == [1, 2, 3]
    assert found(beginnings, [1, 2, 5, 6, 7, 8]) == [1, 2, 5, 6, 7]
    assert found(beginnings, [1]) == [1]
    assert found(beginnings, [2, 3]) == [] == found(beginnings, [])


def test_a_salt_shares_with_none_but_itself() -> None:
    beginnings = kept([1, 2, 3], salt="mine")
    assert found(beginnings, [1, 2, 3]) == [] and found(beginnings, [1, 2, 3], "mine") == [1, 2, 3]


def test_what_was_not_used_goes_first() -> None:
    third = ROWS // 3
    one, two, three, four = (list(range(n * 10_000, n * 10_000 + third)) for n in range(1, 5))
    beginnings = kept(one, two, three)
    assert found(beginnings, one) == one
    beginnings.keep("", np.array(four), kv(np.array(four)), -kv(np.array(four)))
    assert [found(beginnings, ids) for ids in (one, two, three, four)] == [one, [], three, four]
    beginnings.keep("", np.arange(ROWS + 1), kv(np.arange(ROWS + 1)), kv(np.arange(ROWS + 1)))  # too long
    assert found(beginnings, four) == four


def test_a_longer_one_takes_its_beginnings_place() -> None:
    half = list(range(ROWS // 2))
    beginnings = kept(half, list(range(ROWS // 2 + 8)), list(range(5_000, 5_000 + ROWS // 2 - 8)))
    assert found(beginnings, half) == half
