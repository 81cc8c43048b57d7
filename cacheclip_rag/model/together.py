"""The canvases of several requests as one cache, for a forward over rows of all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .attention import SharedRows


class SharedCanvas(Cache):
    """The canvases of several parts as one cache of transformers, for one forward."""

    def __init__(self, shared: SharedRows) -> None:
        layers = range(min(len(canvas.layers) for canvas in shared.canvases))
        super().__init__(layers=[_SharedLayer(number, shared) for number in layers])


class _SharedLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, number: int, shared: SharedRows) -> None:
        super().__init__()
        self._layers = [canvas.layers[number] for canvas in shared.canvases]
        self._spans = shared.spans
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for layer, span in zip(self._layers, self._spans, strict=True):
            layer.update(key_states[:, :, span], value_states[:, :, span])
        return key_states, value_states  # attention reads the canvases

    def get_seq_length(self) -> int:
        return max(layer.get_seq_length() for layer in self._layers)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        return max(layer.get_max_length() for layer in self._layers)

    def get_max_cache_shape(self) -> int:  # the name before transformers 5.23
        return self.get_max_length()
