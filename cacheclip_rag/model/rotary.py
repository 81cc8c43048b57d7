"""RoPE: moving already rotated keys to other positions."""

from __future__ import annotations

import torch
from torch import Tensor


class Rotary:
    """Moves rotated keys by rotating them once more: ``R(a) R(b) = R(a + b)``.

    ``inverse_frequencies [L, d/2]`` float32: the model's own, one row per layer (models with local and global layers
    use different ones). Only the first d of a head's D dimensions are rotated (partial-rotary models keep the rest).
    The model's attention scaling factor (YaRN) is not applied: the stored key contains it already.
    Angles are computed on the CPU: float32 loses digits of them at long distances, and not every device has float64.
    Source: FusionRAG (arXiv 2601.12904), appendix A.1.
    """

    def __init__(self, inverse_frequencies: Tensor) -> None:
        self.inverse_frequencies = inverse_frequencies.float().cpu()

    def rotate(self, keys: Tensor, delta: int, out: Tensor | None = None) -> Tensor:
        """Keys ``[L, Hk, n, D]`` moved by ``delta`` positions (tokens; may be negative), computed in float32.

        A delta of 0 copies bit for bit. The result is written to ``out`` (same shape), if given.
        """
        out = torch.empty_like(keys) if out is None else out
        if delta == 0:
            return out.copy_(keys)
        angle = delta * self.inverse_frequencies.double()
        cos, sin = (f(angle).float()[:, None, None, :].to(keys.device) for f in (torch.cos, torch.sin))
        half = angle.shape[-1]
        a, b = keys[..., :half].float(), keys[..., half : 2 * half].float()
        # Half-split layout: dimension i is paired with i + d/2.
        out[..., :half] = a * cos - b * sin
        out[..., half : 2 * half] = b * cos + a * sin
        if 2 * half < keys.shape[-1]:
            out[..., 2 * half :] = keys[..., 2 * half :]
        return out


class PerTokenRotation:
    """Moves one layer's keys ``[n, Hk, D]`` float32, each token by its own offset ``by [n]`` (may be negative).

    Keys of different positions can be averaged after moving them to position 0.
    """

    def __init__(self, rotary: Rotary, by: Tensor) -> None:
        self._frequencies, self._by = rotary.inverse_frequencies, by.cpu()
        self._angles: dict[tuple[float, ...], tuple[Tensor, Tensor]] = {}  # most models have one row, some two kinds

    def __call__(self, keys: Tensor, layer: int) -> Tensor:
        frequencies = self._frequencies[min(layer, len(self._frequencies) - 1)]
        name = tuple(frequencies.tolist())
        if name not in self._angles:
            angle = self._by[:, None, None].double() * frequencies.double()
            cos, sin = torch.cos(angle).float(), torch.sin(angle).float()  # [n, 1, d/2]
            self._angles[name] = cos.to(keys.device), sin.to(keys.device)
        cos, sin = self._angles[name]
        half = cos.shape[-1]
        a, b, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
