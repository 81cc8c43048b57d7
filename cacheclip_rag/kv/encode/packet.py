"""KV Packet's encoder: chunks between a trained header and a trained trailer, whose KV is stored with theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...chunks import ChunkKV
from ...prompt import SoftTokens
from ...prompt.soft import SoftKind
from .base import Front, Text, encode_behind
from .isolated import Isolated

if TYPE_CHECKING:
    from ...model.backbone import Backbone


@dataclass(frozen=True)
class Packet(Isolated):
    """KV Packet: ``KV = prefill([header; C_i; trailer])``; all of its rows are stored, and placed in a prompt together.

    Header and trailer are soft tokens, the same around every chunk. They absorb what encoding apart does to a chunk's
    edges; the model stays as it is. In a prompt they have positions of their own, and are never recomputed.
    ``adapter``: the folder that ``cacheclip tune packet`` wrote; there is no method without it.
    Source: KV Packet (arXiv 2604.13226).
    """

    prefix: str | None = ""

    trained: ClassVar[SoftKind] = "packet"

    def soft_tokens(self, backbone: Backbone) -> SoftTokens:
        return SoftTokens.of(*backbone.soft, stored=True)

    def encode(self, backbone: Backbone, texts: Sequence[Text], fronts: Sequence[Front]) -> list[ChunkKV]:
        soft = self.soft_tokens(backbone)
        return encode_behind(backbone, [(text, soft.wrapped(tokens)) for text, tokens in texts], fronts)
