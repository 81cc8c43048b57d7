"""The attention implementations by their names in transformers, and the choice among them for a device."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface

from .mask import SparseRows
from .reference import reference_attention
from .sdpa import sdpa_attention
from .shared import shareable
from .triton_attention import triton_attention
from .windows import noting_attention

log = logging.getLogger("cacheclip_rag")

AUTO = "auto"
# Not "..._sdpa": transformers refuses such a name for models whose scores its own sdpa cannot cap.
SDPA = "cacheclip_torch"
REFERENCE = "cacheclip_reference"
TRITON = "cacheclip_triton"
NOTING = "cacheclip_noting"
"""`SDPA` that records each layer's sliding window, for the checks of `composability`."""

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    SDPA: sdpa_attention,
    REFERENCE: reference_attention,
    TRITON: triton_attention,
    NOTING: noting_attention,
}

# transformers builds no mask for names that are not registered with its mask interface; ours follows from the rows.
for _name, _function in IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, shareable(_function))


def choose(name: str, device: torch.device, dtype: torch.dtype, width: int) -> str:
    """The implementation to use on ``device`` for heads of dimension ``width``: ``name``, unless that is `AUTO`.

    `AUTO` is `TRITON` on a CUDA (or ROCm) device with triton installed and a kernel that passes `kernel_is_right`, else
    `SDPA`. For `TRITON`, raises `ImportError` without triton and `ValueError` on a device it cannot compile for.
    """
    if name == AUTO:
        return (
            TRITON if device.type == "cuda" and find_spec("triton") and kernel_is_right(device, dtype, width) else SDPA
        )
    if name == TRITON and not find_spec("triton"):
        raise ImportError(f'attention="{TRITON}" needs triton (pip install triton); "{SDPA}" needs nothing')
    if name == TRITON and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f'attention="{TRITON}" needs a CUDA device, not {device.type}: take "{SDPA}", or set TRITON_INTERPRET=1 '
            "before Python starts, to try the kernel slowly in Triton's interpreter"
        )
    return name


@cache
def kernel_is_right(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the Triton kernel agrees with the reference on this device, on a few rows; logs a warning if not.

    Triton compiles on first use, which needs a C compiler and a supported GPU. A failure must show here, and not in the
    middle of a request.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([0, 3, 70, 71, 199])
    query, key, value = (
        torch.randn(1, heads, length, width, generator=generator).to(device, dtype)
        for heads, length in ((2, len(rows)), (1, 200), (1, 200))
    )
    sparse, scaling = SparseRows(rows, device), width**-0.5
    try:
        from .q_sparse import q_sparse_attention

        ours = q_sparse_attention(query, key, value, sparse.rows, scaling)
        layer = SimpleNamespace(layer_idx=0)
        expected, _ = reference_attention(layer, query, key, value, None, scaling, cacheclip=sparse)
        error = float((ours - expected).float().norm() / expected.float().norm())
    except Exception as failure:  # compilers fail in many ways, and none of them may prevent a model from loading
        log.warning("the Triton kernel does not run on %s (%r): PyTorch's attention is used", device, failure)
        return False
    if not error < 0.02:  # rounding in bfloat16 is a fifth of that
        log.warning("the Triton kernel is off by %.0f%% on %s: PyTorch's attention is used", 100 * error, device)
        return False
    return True
