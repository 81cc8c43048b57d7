"""FusionRAG's preprocessing: a chunk's KV computed behind the stored KV of other chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...chunks import ChunkKV
from ...prompt import Tokens
from .base import Encoder, Front

if TYPE_CHECKING:
    from ...model.backbone import Backbone


def fused(
    encoder: Encoder,
    backbone: Backbone,
    chunks: Sequence[ChunkKV],
    contexts: Sequence[Sequence[ChunkKV]],
    prefix: Front,
) -> list[ChunkKV]:
    """``KV(C_i) = prefill(C_i | S, KV(C_a), KV(C_b), ...)`` for every chunk ``C_i``, all in one forward.

    ``prefix`` is the KV of S, ``[L, Hk, P, D]``. A context is a list of chunks that were encoded in isolation behind S;
    their KV is not recomputed (one hop), only rotated to contiguous positions. The results keep the positions they were
    computed at, and are rotated when they are placed, which saves one rounding.
    Source: FusionRAG (arXiv 2601.12904), section 3.1, eq. 8 to 10.
    """
    texts = [(chunk.text, Tokens(chunk.ids, chunk.offsets)) for chunk in chunks]
    made = encoder.encode(backbone, texts, [joined(backbone, prefix, context) for context in contexts])
    names = [tuple(other.text for other in context) for context in contexts]
    return [replace(chunk, context=context) for chunk, context in zip(made, names, strict=True)]


def joined(backbone: Backbone, prefix: Front, chunks: Sequence[ChunkKV]) -> Front:
    """The KV of a prefix with chunks behind it, ``[L, Hk, P + sum n, D]``: keys rotated to contiguous positions."""
    row = 0 if prefix is None else prefix[0].shape[2]
    canvas = backbone.canvas(row + sum(map(len, chunks)))
    if prefix is not None:
        canvas.write(0, *prefix)
    for chunk in chunks:
        canvas.place(chunk, slice(0, len(chunk)), row)
        row += len(chunk)
    return canvas.keys[:, 0], canvas.values[:, 0]
