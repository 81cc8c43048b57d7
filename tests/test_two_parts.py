"""Attention in two parts is attention: rows anywhere, keys anywhere, with and without grouped heads."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from kernel_cases import distance, scattered
from torch import Tensor

from cacheclip_rag.model.attention import SparseRows, reference_attention, sdpa, sdpa_attention, two_parts

ROWS = {
    "scattered over more than one block": scattered(300, 900),
    "contiguous, as in a prefill by pieces": list(range(500, 900)),
    "two rows at the end, as drafts are": [898, 899],
    "no key before the first row": list(range(200)),
    "one key before the first row": list(range(1, 200)),
}


def attend(rows: list[int], heads: int, kv_heads: int, dtype: torch.dtype, window: int | None = None) -> list[Tensor]:
    """What the implementation and what the oracle compute, ``[1, S, H, D]``."""
    generator = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(1, len(rows), heads, 32, generator=generator)
    key, value = (2 * torch.randn(1, kv_heads, rows[-1] + 1, 32, generator=generator) for _ in range(2))
    query, key, value = query.to(dtype).transpose(1, 2), key.to(dtype), value.to(dtype)
    implementations: list[Callable[..., tuple[Tensor, Any]]] = [sdpa_attention, reference_attention]
    module, sparse = SimpleNamespace(layer_idx=0), SparseRows(torch.tensor(rows), "cpu")
    return [how(module, query, key, value, None, sliding_window=window, cacheclip=sparse)[0] for how in implementations]


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("name", list(ROWS))
def test_equals_the_oracle(
    monkeypatch: pytest.MonkeyPatch, name: str, heads: int, kv_heads: int, dtype: torch.dtype, error: float
) -> None:
    monkeypatch.setattr(sdpa, "APART", 1)
    ours, oracle = attend(ROWS[name], heads, kv_heads, dtype)
    assert ours.dtype == dtype
    assert distance(ours, oracle) < error


def test_only_long_contexts_without_a_window_are_computed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Mock(side_effect=two_parts.in_two_parts)
    monkeypatch.setattr(sdpa, "in_two_parts", spy)
    rows = list(range(sdpa.APART - 100, sdpa.APART + 100))
    attend(rows, 2, 1, torch.float32)  # its first block begins before APART, its second behind it
    assert spy.call_count == 1
    attend(rows, 2, 1, torch.float32, window=64)
    assert spy.call_count == 1


def test_masks_of_a_long_context_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's mask covers the keys from its first row on, not the whole context."""
    sizes: list[int] = []

    def bias(self: SparseRows, *given: Any) -> Tensor:
        sizes.append((made := original(self, *given)).numel())
        return made

    original = SparseRows.bias
    monkeypatch.setattr(SparseRows, "bias", bias)
    attend(list(range(30_000, 30_300)), 2, 2, torch.float32)
    assert sizes and max(sizes) <= 128 * 128


def test_values_narrower_than_keys_are_computed_with_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "APART", 1)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, n, 16, generator=generator) for n in (20, 60))
    value = torch.randn(1, 2, 60, 8, generator=generator)
    assert not two_parts.splittable(query, key, value)
