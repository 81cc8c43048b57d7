"""Rows of several requests in one forward: each part attends over its own canvas.

Everything but attention treats rows one by one, so that the rows of all parts go through it as one text: the weights
are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .mask import SparseRows

Attention = Callable[..., tuple[Tensor, None]]


class SharedRows:
    """The rows of several parts, one after the other, each with its own `SparseRows` and canvas."""

    def __init__(self, rows: Sequence[SparseRows], canvases: Sequence[Cache]) -> None:
        self.rows, self.canvases = rows, canvases
        self.spans = [slice(*pair) for pair in pairwise(accumulate((len(one.rows) for one in rows), initial=0))]
        """Where each part's rows are among all."""

    def attend(
        self, attention: Callable[..., tuple[Tensor, Any]], module: Any, query: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """The output ``[1, S, H, D]`` of ``attention`` for ``query [1, H, S, D]``, part by part."""
        outputs = []
        for span, rows, canvas in zip(self.spans, self.rows, self.canvases, strict=True):
            layer = canvas.layers[module.layer_idx]
            keys, values = layer.keys[:, :, : canvas.length], layer.values[:, :, : canvas.length]
            outputs.append(attention(module, query[:, :, span], keys, values, mask, cacheclip=rows, **options)[0])
        return torch.cat(outputs, dim=1), None


def shareable(attention: Callable[..., Any]) -> Attention:
    """An implementation that takes `SharedRows` as well, as ``cacheclip``."""

    @wraps(attention)
    def either(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, cacheclip: Any = None, **kw: Any
    ) -> tuple[Tensor, None]:
        if isinstance(cacheclip, SharedRows):
            return cacheclip.attend(attention, module, query, mask, **kw)
        output: tuple[Tensor, None] = attention(module, query, key, value, mask, *args, cacheclip=cacheclip, **kw)
        return output

    return either
