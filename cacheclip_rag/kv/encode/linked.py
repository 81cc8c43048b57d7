"""KVLink's encoder: chunks in isolation, with trained link tokens behind each, which are computed with the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...prompt import SoftTokens
from ...prompt.soft import SoftKind
from .isolated import Isolated

if TYPE_CHECKING:
    from ...model.backbone import Backbone


@dataclass(frozen=True)
class Linked(Isolated):
    """KVLink: chunks are encoded alone; in a prompt, k link tokens stand behind each whose KV is reused.

    Link tokens are soft tokens. Their KV is computed with every prompt, with full attention to all before them; they
    have positions of their own, so that what follows moves by k. ``adapter``: the folder that ``cacheclip tune links``
    wrote, with the link tokens and the weights they were trained with; there is no method without it.
    Source: KVLink (arXiv 2502.16002). Its link tokens differ by the chunk's number; ours are the same behind each, so
    that a prompt may have more chunks than those of the training.
    """

    prefix: str | None = ""

    trained: ClassVar[SoftKind] = "links"

    def soft_tokens(self, backbone: Backbone) -> SoftTokens:
        return SoftTokens.of(*backbone.soft, stored=False)
