"""Sparse causal attention: some rows of a prompt as queries, every earlier slot of the canvas as keys.

transformers calls one of three implementations by its registered name (`SDPA`, `TRITON`, `REFERENCE`). The state of one
forward is passed from ``model.forward`` to the attention function as a keyword argument, ``cacheclip=SparseRows(...)``.
Nothing is global, so requests can run in parallel.
"""

from __future__ import annotations

from .implementations import AUTO, IMPLEMENTATIONS, NOTING, REFERENCE, SDPA, TRITON, choose
from .mask import SparseRows
from .reference import reference_attention
from .sdpa import sdpa_attention
from .shared import SharedRows
from .triton_attention import triton_attention
from .windows import windows_given

__all__ = [
    "AUTO",
    "IMPLEMENTATIONS",
    "NOTING",
    "REFERENCE",
    "SDPA",
    "TRITON",
    "SharedRows",
    "SparseRows",
    "choose",
    "reference_attention",
    "sdpa_attention",
    "triton_attention",
    "windows_given",
]
