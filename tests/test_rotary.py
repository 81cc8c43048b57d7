"""Moving keys on devices that have no float64 (Apple's GPU)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cacheclip_rag.model.rotary import PerTokenRotation, Rotary


class NoFloat64OffTheCPU(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64 and tensor.device.type != "cpu":
                raise TypeError(f"{func}: float64 on {tensor.device}")
        return out


def test_keys_are_moved_without_float64_on_the_devices_that_hold_them() -> None:
    rotary = Rotary(torch.rand(2, 4))
    with NoFloat64OffTheCPU():
        with pytest.raises(TypeError, match="float64 on meta"):
            torch.zeros(1, device="meta").double()  # the mode sees what it is for
        keys = torch.empty(2, 3, 5, 8, dtype=torch.float16, device="meta")
        moved = rotary.rotate(keys, 7)
        by = PerTokenRotation(rotary, torch.tensor([1, 2, 3]))(torch.empty(3, 2, 8, device="meta"), 1)
    assert moved.device.type == by.device.type == "meta" and moved.dtype == torch.float16


def test_a_far_move_is_as_exact_as_a_near_one() -> None:
    """Forth and back by 100,000 tokens: angles in float32 would be off by hundredths of a radian."""
    rotary = Rotary(1.0 / 10_000 ** (torch.arange(0, 8, 2) / 8)[None])
    keys = torch.randn(1, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    angle = 100_003 * rotary.inverse_frequencies.double()[0]
    a, b = keys.double()[..., :4], keys.double()[..., 4:]
    expected = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)
    torch.testing.assert_close(rotary.rotate(keys, 100_003), expected.float(), atol=1e-5, rtol=0)
