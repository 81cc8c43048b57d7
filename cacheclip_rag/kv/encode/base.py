"""The interface of an encoder, and the forward that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ...chunks import ChunkKV
from ...prompt import NO_SOFT_TOKENS, SoftTokens, Tokens

if TYPE_CHECKING:
    from ...model.backbone import Backbone

Front = tuple[Tensor, Tensor] | None
"""Keys and values ``[L, Hk, P, D]``, from position 0 on, that a chunk is encoded behind; None for nothing."""

Text = tuple[str, Tokens]
"""A chunk's text and its tokens."""


class Encoder(Protocol):
    """Computes chunk KV. Encoders are frozen dataclasses: their fields are part of a chunk's identity."""

    def prefix_ids(self, backbone: Backbone) -> Tensor:
        """The encode prefix: the tokens ``[P]`` int64 that chunks are encoded behind."""

    def encode(self, backbone: Backbone, texts: Sequence[Text], fronts: Sequence[Front]) -> list[ChunkKV]:
        """The KV of each text behind its own front. The texts do not attend to each other."""


def soft_tokens(encoder: Encoder, backbone: Backbone) -> SoftTokens:
    """The soft tokens around an encoder's chunks: most encoders have none, and need not say so."""
    of = getattr(encoder, "soft_tokens", None)
    return NO_SOFT_TOKENS if of is None else of(backbone)


def encode_behind(
    backbone: Backbone, texts: Sequence[Text], fronts: Sequence[Front], activations: int = 0
) -> list[ChunkKV]:
    """``KV(C_i) = prefill(C_i | S_i)`` for every text ``C_i`` and front ``S_i``, all in one forward.

    The canvas holds ``[S_1; C_1; S_2; C_2; ...]``. Each text attends to its own front and to itself, so short texts
    share a forward without padding. With ``activations``, the residual stream that enters this layer is kept as well,
    as ``extra["activations"] [n, d]``.
    """
    starts = [0 if front is None else front[0].shape[2] for front in fronts]
    lengths = [len(tokens) for _, tokens in texts]
    ends = list(accumulate(start + length for start, length in zip(starts, lengths, strict=True)))
    canvas, floors = backbone.canvas(ends[-1]), [0, *ends[:-1]]
    for floor, front in zip(floors, fronts, strict=True):
        if front is not None:
            canvas.write(floor, *front)
    ids = torch.cat([tokens.ids for _, tokens in texts])
    positions = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    lowest = torch.tensor(floors).repeat_interleave(torch.tensor(lengths))
    apart: dict[str, Any] = {"positions": positions, "floors": lowest if len(texts) > 1 else None}
    if activations:
        hidden = backbone.advance(ids, lowest + positions, canvas, 0, activations, **apart)
        backbone.forward(hidden, lowest + positions, canvas, first=activations, logits=0, **apart)
    else:
        backbone.forward(ids, lowest + positions, canvas, logits=0, **apart)
    made = []
    for number, ((text, tokens), start, end) in enumerate(zip(texts, starts, ends, strict=True)):
        keys, values = canvas.read(slice(end - len(tokens), end))
        extra = {"activations": hidden.split(lengths)[number].cpu().clone()} if activations else {}
        made.append(ChunkKV(text, tokens.ids, tokens.offsets, keys.cpu(), values.cpu(), position=start, extra=extra))
    return made
