"""Chunks encoded in isolation, behind a prefix that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ...chunks import ChunkKV
from .base import Front, Text, encode_behind

if TYPE_CHECKING:
    from ...model.backbone import Backbone


@dataclass(frozen=True)
class Isolated:
    """``KV(C_i) = prefill(C_i | S)``: forward ``[S; C_i]``, keep the rows of ``C_i``.

    ``prefix`` is the encode prefix S as text: None takes what precedes the user's text in the model's chat template, ""
    encodes chunks without a prefix (PromptCache). With a shared prefix there is only one attention sink, and the
    prefix's own KV serves every prompt that begins with it. ``adapter``: the folder of a LoRA adapter, as ``cacheclip
    tune blocks`` writes it; its weights compute the whole request, not only its chunks. It is no part of the identity
    of KV, which the weights themselves are.
    Source: CacheClip (arXiv 2510.10129), also APE and SEL; FusionRAG eq. 5.
    """

    prefix: str | None = None
    adapter: str | None = field(default=None, repr=False)

    def prefix_ids(self, backbone: Backbone) -> Tensor:
        return backbone.tokenise_prompt(backbone.shared_prefix() if self.prefix is None else self.prefix).ids

    def encode(self, backbone: Backbone, texts: Sequence[Text], fronts: Sequence[Front]) -> list[ChunkKV]:
        return encode_behind(backbone, texts, fronts)
