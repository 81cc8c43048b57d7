"""Tries a model on a few tokens before any request comes: what reuse rests on is tested, not listed by architecture."""

from __future__ import annotations

import torch
from torch import Tensor

from cacheclip_rag.compute import Part

from .computer import Keep, PagedWorkspace, run_forward
from .filling import Filler

_ROWS, _SHIFT = 24, 7
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


@torch.inference_mode()
def tried(filler: Filler) -> str | None:
    """Why chunks of this model cannot be moved and joined, or None.

    On blocks that no request has yet: rows computed as several virtual sequences are those of one run, a row that is
    computed again keeps its value, and the first layer's keys move by the model's own rotation.
    """
    model = filler.model
    try:
        for layer in range(len(model.layers)):
            model.rotary(layer)
    except AttributeError:
        return "its keys are not rotated (no RoPE), so they cannot be moved"
    if len(set(model.heads)) != 1:
        return "its layers have different numbers of heads"
    limit = _TOLERANCE.get(model.dtype, 6e-2)
    ids, rows = (7 + 13 * torch.arange(_ROWS)) % 97 + 3, torch.arange(_ROWS)
    whole = _computed(filler, ids, [rows])
    pieces = _computed(filler, ids, [rows[:9], torch.cat([rows[9:12], rows[15:]]), rows[12:15], rows[12:]])
    for got, name in ((pieces.keys, "keys"), (pieces.values, "values")):
        expected = whole.keys if name == "keys" else whole.values
        if (error := _error(got[:, :_ROWS], expected[:, :_ROWS])) > limit:
            return f"scattered rows do not give the {name} of a run (relative error {error:.1e})"
    moved = _computed(filler, ids[_SHIFT:], [rows[:-_SHIFT]])
    keys = filler.tables.move(moved.keys[0, : _ROWS - _SHIFT], 0, rows[:-_SHIFT], rows[_SHIFT:])
    if (error := _error(keys, whole.keys[0, _SHIFT:_ROWS])) > limit:
        return f"its keys do not move by the rotation of its tables (relative error {error:.1e})"
    return None


def _computed(filler: Filler, ids: Tensor, passes: list[Tensor]) -> PagedWorkspace:
    """The KV of ``ids``, computed in these passes over their rows."""
    model = filler.model
    blocks = torch.arange(1, 1 + -(-_ROWS // model.block_size), dtype=torch.int32)
    workspace = PagedWorkspace(model, filler.tables, blocks, 0, slice(None))
    for rows in passes:
        run_forward(model, [Part(workspace, ids[rows], rows, hooks=[Keep()])], None)
    return workspace


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12))
