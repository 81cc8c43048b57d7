"""Sparse causal attention: some rows of a prompt as queries, every earlier slot of the canvas as keys.

``transformers`` calls one of the two implementations by its registered name (`SDPA`, `REFERENCE`). What a single
forward needs to know travels as one keyword argument, ``cacheclip=Sparse(...)``, from ``model.forward`` down to the
attention function; nothing is global, so requests may run side by side.
"""

from __future__ import annotations

from transformers import AttentionInterface

from .mask import Enough, Shape, Sparse, visible
from .probe import AttentionProbe, StopAt
from .reference import reference_attention
from .scaled import ScaledContext
from .sdpa import sdpa_attention
from .top_chunks import TopChunks

SDPA = "cacheclip_sdpa"
REFERENCE = "cacheclip_reference"

# Names that are not registered with transformers' mask interface get no mask from it: ours comes from the rows.
AttentionInterface.register(SDPA, sdpa_attention)
AttentionInterface.register(REFERENCE, reference_attention)

__all__ = [
    "REFERENCE",
    "SDPA",
    "AttentionProbe",
    "Enough",
    "ScaledContext",
    "Shape",
    "Sparse",
    "StopAt",
    "TopChunks",
    "reference_attention",
    "sdpa_attention",
    "visible",
]
