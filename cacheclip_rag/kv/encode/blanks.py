"""EPIC's zero-overhead linking: chunks encoded behind a few dummy tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...chunks import ChunkKV
from ...errors import ConfigurationError
from .base import Front, Text, encode_behind

if TYPE_CHECKING:
    from ...model.backbone import Backbone


@dataclass(frozen=True)
class Blanks:
    """Link0: ``p = count`` dummy tokens before each chunk absorb the attention sink; their KV is discarded.

    ``token`` is the dummy's text; None takes the model's begin-of-sequence token, or a blank if it has none. A model
    that opens every sequence with a begin-of-sequence token has it before the dummies, as in EPIC's repository.
    Source: EPIC (arXiv 2410.15332), zero-overhead linking; the study (2603.20218) takes blanks, p in 1, 2, 3, 5, 10.
    """

    count: int = 5
    token: str | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigurationError(f"count must be at least 1 dummy token, not {self.count}")

    def prefix_ids(self, backbone: Backbone) -> Tensor:
        opening = backbone.tokenise_prompt("").ids
        dummy = opening if self.token is None and len(opening) else backbone.tokenise(self.token or " ").ids
        if len(dummy) != 1:
            raise ConfigurationError(f"{self.token!r} must be one token of this model, not {len(dummy)}")
        return torch.cat([opening, dummy.repeat(self.count)])

    def encode(self, backbone: Backbone, texts: Sequence[Text], fronts: Sequence[Front]) -> list[ChunkKV]:
        return encode_behind(backbone, texts, fronts)
