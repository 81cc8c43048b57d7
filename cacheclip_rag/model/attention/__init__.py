"""Sparse causal attention: some rows of a prompt as queries, every earlier slot of the canvas as keys.

``transformers`` calls one of the three implementations by its registered name (`SDPA`, `TRITON`, `REFERENCE`). What a
single forward needs to know travels as one keyword argument, ``cacheclip=Sparse(...)``, from ``model.forward`` down to
the attention function; nothing is global, so requests may run side by side.
"""

from __future__ import annotations

from .implementations import AUTO, IMPLEMENTATIONS, NOTING, REFERENCE, SDPA, TRITON, choose
from .mask import Enough, Shape, Sparse, visible
from .probe import AttentionProbe, StopAt
from .reference import reference_attention
from .scaled import ScaledContext
from .sdpa import sdpa_attention
from .top_chunks import TopChunks
from .triton_attention import triton_attention
from .windows import windows_given

__all__ = [
    "AUTO",
    "IMPLEMENTATIONS",
    "NOTING",
    "REFERENCE",
    "SDPA",
    "TRITON",
    "AttentionProbe",
    "Enough",
    "ScaledContext",
    "Shape",
    "Sparse",
    "StopAt",
    "TopChunks",
    "choose",
    "reference_attention",
    "sdpa_attention",
    "triton_attention",
    "visible",
    "windows_given",
]
