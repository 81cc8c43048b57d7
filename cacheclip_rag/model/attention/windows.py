"""Records the sliding window that transformers passes to each layer's attention, to check it against the config."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .sdpa import sdpa_attention

_GIVEN = "_cacheclip_window"


def noting_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`sdpa_attention` that records its ``sliding_window`` argument on the layer's module."""
    setattr(module, _GIVEN, kwargs.get("sliding_window"))
    return sdpa_attention(module, query, key, value, attention_mask, **kwargs)


def windows_given(model: nn.Module) -> dict[int, int | None]:
    """By layer, the sliding window that `noting_attention` got last, None for none. The records are removed."""
    given: dict[int, int | None] = {}
    module: Any
    for module in model.modules():
        if hasattr(module, _GIVEN):
            given[int(module.layer_idx)] = getattr(module, _GIVEN)
            delattr(module, _GIVEN)
    return given
