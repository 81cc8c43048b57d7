"""A second copy of a model's linear weights in 4 bits, which decoding steps of few rows read instead of the first one.

A decoding step takes as long as reading the weights does, so a quarter of the bytes is half of the time. From some six
rows on, computing takes longer than reading, and bfloat16 is faster (docs/decoding.md has the measurements).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from .packed import PackedLinear

Format = Literal["auto", "int4"]
"""What decoding steps read: the model's own weights, or a copy of them in 4 bits."""

GROUP = 32
"""Weights that share a scale and a zero point."""
ROWS = 4
"""A pass of more rows than this reads the model's own weights."""

_here = threading.local()  # others may be prefilling with the same model meanwhile


def check(name: object) -> None:
    """Raises `ConfigurationError` unless ``name`` is one of `Format`."""
    if name not in get_args(Format):
        raise ConfigurationError(f'decode_weights must be "auto" (the model\'s own) or "int4", not {name!r}')


class DecodeWeights:
    """The 4-bit copies of a model's linear layers, beside the layers themselves. ``nbytes``: what they take in memory.

    Layers of a subclass of ``nn.Linear`` (adapters, say) and of sizes that the kernel does not take read their own
    weights in every pass. Changes of weights after this was made are not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        """Quantise ``model``'s linear layers; some seconds for a billion weights.

        Raises `ConfigurationError` for a model that is not on the CPU.
        """
        device = next(model.parameters()).device
        if device.type != "cpu":
            raise ConfigurationError(f'decode_weights="int4" is for models on the CPU, not on {device}: leave it out')
        self.nbytes = 0
        for module in list(model.modules()):
            if type(module) in _CLASSES:
                layer = cast(FewRowsLinear, module)
                if fits(layer.out_features, layer.in_features):
                    layer._four, layer._scales = quantise(layer.weight)
                    # Not a module around it: names of weights, which identify the model's KV, stay as they are.
                    layer.__class__ = _CLASSES[type(module)]
                    self.nbytes += layer._four.nbytes + layer._scales.nbytes


@contextmanager
def decoding() -> Iterator[None]:
    """Passes of at most `ROWS` rows on this thread read 4 bits, of models that have them."""
    before = getattr(_here, "decoding", False)  # steps of other streams are computed in pauses of a forward
    _here.decoding = True
    try:
        yield
    finally:
        _here.decoding = before


class FewRows(nn.Module):
    """What a linear layer with a copy of its weights in 4 bits does: ``x [..., in] -> [..., out]`` from either copy."""

    _four: Tensor
    _scales: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > ROWS * x.shape[-1] or not getattr(_here, "decoding", False):
            own: Tensor = super().forward(x)
            return own
        output: Tensor = torch._weight_int4pack_mm_for_cpu(x.flatten(0, -2), self._four, GROUP, self._scales)
        if isinstance(self.bias, Tensor):
            output = output + self.bias
        return output.unflatten(0, x.shape[:-1])


class FewRowsLinear(FewRows, nn.Linear):
    """An ordinary linear layer with 4-bit weights beside its own."""

    def unpacked(self) -> nn.Linear:
        """An ordinary layer with the same weight and bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)


class FewRowsPackedLinear(FewRows, PackedLinear):
    """A packed linear layer with 4-bit weights beside its own."""


_CLASSES: dict[type, type] = {nn.Linear: FewRowsLinear, PackedLinear: FewRowsPackedLinear}


def fits(out: int, width: int) -> bool:
    """Whether PyTorch's kernel takes a weight ``[out, width]``."""
    return out % 32 == 0 and width % GROUP == 0


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight [out, in]`` in 4 bits: the packed numbers of PyTorch's kernel, and ``[in / GROUP, out, 2]`` scales and
    zero points in the weight's dtype.

    Each group of `GROUP` weights of a row is spread evenly over 16 values between its least and its greatest.
    """
    out, width = weight.shape
    groups = weight.detach().float().view(out, width // GROUP, GROUP)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    # Rounded as the kernel will read them, so that the numbers fit the scale that they are multiplied by.
    scale = ((high - low) / 15).clamp_min(1e-8).to(weight.dtype).float()
    zero = (low + 8 * scale).to(weight.dtype).float()
    numbers = ((groups - zero) / scale + 8).round_().clamp_(0, 15).to(torch.int32).view(out, width)
    scales = torch.stack([scale[..., 0], zero[..., 0]], dim=-1).to(weight.dtype).transpose(0, 1).contiguous()
    packed: Tensor = torch._convert_weight_to_int4pack_for_cpu(numbers, 1)
    return packed, scales
