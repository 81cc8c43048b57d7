"""DroidSpeak's encoder: KV and the residual stream at one layer, so that recomputation can start at that layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...chunks import ChunkKV
from ...errors import ConfigurationError
from .base import Front, Text, encode_behind
from .isolated import Isolated

if TYPE_CHECKING:
    from ...model.backbone import Backbone


@dataclass(frozen=True)
class WithActivations(Isolated):
    """`Isolated`, and ``extra["activations"] [n, d]``: the residual stream that enters ``transition_layer``.

    ``transition_layer`` is capped at the last layer but one, so that a layer is left to compare. The activations take
    ``d`` numbers per token besides the KV's ``2 Hk D L``. Source: DroidSpeak (arXiv 2411.02820), "E cache", in the
    study's adaptation to chunks (2603.20218).
    """

    prefix: str | None = None
    transition_layer: int = 4

    def __post_init__(self) -> None:
        if self.transition_layer < 1:
            raise ConfigurationError(
                f"transition_layer must be at least 1, not {self.transition_layer}: tokens enter layer 0"
            )

    def encode(self, backbone: Backbone, texts: Sequence[Text], fronts: Sequence[Front]) -> list[ChunkKV]:
        return encode_behind(backbone, texts, fronts, activations=min(self.transition_layer, backbone.layers - 2))
