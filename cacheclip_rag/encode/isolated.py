"""A chunk by itself, behind a prefix that all chunks share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..backbone import Backbone, Tokens
from ..chunks import ChunkKV


class Encoder(Protocol):
    """One way of encoding. Frozen dataclasses, so that their fields are part of a chunk's identity."""

    @property
    def prefix(self) -> str | None:
        """The text chunks are encoded behind; None for the model's chat-template start."""

    def encode(self, backbone: Backbone, text: str, tokens: Tokens, prefix: tuple[Tensor, Tensor] | None) -> ChunkKV:
        """KV of ``tokens`` (those of ``text``) behind the shared prefix, whose KV ``[L, Hk, P, D]`` is given."""


@dataclass(frozen=True)
class Isolated:
    """``KV(C_i) = prefill(C_i | S)``: forward ``[S; C_i]``, keep the rows of ``C_i``.

    ``prefix`` is the text S: None takes what precedes the user's text in the model's chat template, "" encodes the
    chunk bare (PromptCache). Behind a shared prefix the attention sink is there once, and the prefix's own KV serves
    every prompt that begins with it. Source: CacheClip (arXiv 2510.10129), also APE and SEL; FusionRAG eq. 5.
    """

    prefix: str | None = None

    def encode(self, backbone: Backbone, text: str, tokens: Tokens, prefix: tuple[Tensor, Tensor] | None) -> ChunkKV:
        start = 0 if prefix is None else prefix[0].shape[2]
        canvas = backbone.canvas(start + len(tokens))
        if prefix is not None:
            canvas.write(0, *prefix)
        rows = torch.arange(start, start + len(tokens))
        backbone.forward(tokens.ids, rows, canvas, logits=0)
        keys, values = canvas.read(slice(start, start + len(tokens)))
        return ChunkKV(text, tokens.ids, tokens.offsets, keys.cpu(), values.cpu(), position=start)
