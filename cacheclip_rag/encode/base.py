"""What an encoder is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backbone import Backbone, Tokens
from ..chunks import ChunkKV

PrefixKV = tuple[Tensor, Tensor]
Text = tuple[str, Tokens]
"""A chunk's text and its tokens."""


class Encoder(Protocol):
    """One way of encoding. Frozen dataclasses, so that their fields are part of a chunk's identity."""

    def prefix_ids(self, backbone: Backbone) -> Tensor:
        """The tokens ``[P]`` int64 that chunks are encoded behind."""

    def encode(self, backbone: Backbone, texts: Sequence[Text], prefix: PrefixKV | None) -> list[ChunkKV]:
        """KV of each text behind the prefix, whose KV ``[L, Hk, P, D]`` is given. The texts do not see each other."""


def behind(backbone: Backbone, texts: Sequence[Text], prefix: PrefixKV | None, activations: int = 0) -> list[ChunkKV]:
    """``KV(C_i) = prefill(C_i | S)`` for every ``C_i``: forward ``[S; C_1; S; C_2; ...]``, keep the rows of each.

    One forward over one canvas, where every text has the prefix's KV in front of it and sees nothing below: short
    texts keep the processor busy together, and nothing is padded. With ``activations``, the residual stream that enters
    this layer is kept too, as ``extra["activations"] [n, d]``.
    """
    start = 0 if prefix is None else prefix[0].shape[2]
    lengths = [len(tokens) for _, tokens in texts]
    canvas = backbone.canvas(sum(start + length for length in lengths))
    floors = list(accumulate((start + length for length in lengths[:-1]), initial=0))
    if prefix is not None:
        for floor in floors:
            canvas.write(floor, *prefix)
    ids = torch.cat([tokens.ids for _, tokens in texts])
    positions = torch.cat([torch.arange(start, start + length) for length in lengths])
    lowest = torch.tensor(floors).repeat_interleave(torch.tensor(lengths))
    apart: dict[str, Any] = {"positions": positions, "floors": lowest if len(texts) > 1 else None}
    if activations:
        hidden = backbone.advance(ids, lowest + positions, canvas, 0, activations, **apart)
        backbone.forward(hidden, lowest + positions, canvas, first=activations, logits=0, **apart)
    else:
        backbone.forward(ids, lowest + positions, canvas, logits=0, **apart)
    made = []
    for number, ((text, tokens), floor) in enumerate(zip(texts, floors, strict=True)):
        keys, values = canvas.read(slice(floor + start, floor + start + len(tokens)))
        extra = {"activations": hidden.split(lengths)[number].cpu().clone()} if activations else {}
        made.append(ChunkKV(text, tokens.ids, tokens.offsets, keys.cpu(), values.cpu(), position=start, extra=extra))
    return made
