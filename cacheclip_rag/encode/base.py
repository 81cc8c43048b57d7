"""What an encoder is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..backbone import Backbone, Tokens
from ..chunks import ChunkKV

PrefixKV = tuple[Tensor, Tensor]


class Encoder(Protocol):
    """One way of encoding. Frozen dataclasses, so that their fields are part of a chunk's identity."""

    def prefix_ids(self, backbone: Backbone) -> Tensor:
        """The tokens ``[P]`` int64 that chunks are encoded behind."""

    def encode(self, backbone: Backbone, text: str, tokens: Tokens, prefix: PrefixKV | None) -> ChunkKV:
        """KV of ``tokens`` (those of ``text``) behind the prefix, whose KV ``[L, Hk, P, D]`` is given."""


def behind(backbone: Backbone, text: str, tokens: Tokens, prefix: PrefixKV | None, activations: int = 0) -> ChunkKV:
    """``KV(C_i) = prefill(C_i | S)``: forward ``[S; C_i]``, keep the rows of ``C_i``.

    With ``activations``, the residual stream that enters this layer is kept too, as ``extra["activations"] [n, d]``.
    """
    start = 0 if prefix is None else prefix[0].shape[2]
    canvas = backbone.canvas(start + len(tokens))
    if prefix is not None:
        canvas.write(0, *prefix)
    rows = torch.arange(start, start + len(tokens))
    extra = {}
    if activations:
        hidden = backbone.advance(tokens.ids, rows, canvas, 0, activations)
        backbone.forward(hidden, rows, canvas, first=activations, logits=0)
        extra["activations"] = hidden.cpu()
    else:
        backbone.forward(tokens.ids, rows, canvas, logits=0)
    keys, values = canvas.read(slice(start, start + len(tokens)))
    return ChunkKV(text, tokens.ids, tokens.offsets, keys.cpu(), values.cpu(), position=start, extra=extra)
