"""A chunk behind the chunks it is likely to meet in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..backbone import Backbone, Tokens
from ..chunks import ChunkKV
from .base import Encoder, PrefixKV


def fused(
    encoder: Encoder, backbone: Backbone, chunk: ChunkKV, company: Sequence[ChunkKV], prefix: PrefixKV | None
) -> ChunkKV:
    """``KV(C_i) = prefill(C_i | S, KV(C_a), KV(C_b), ...)``: the chunk encoded anew behind its ``company``.

    ``prefix`` is the KV of S, ``[L, Hk, P, D]``; ``company`` are chunks encoded by themselves behind it, in the order
    they shall stand in: their KV is taken as it is (one hop), its keys rotated so that positions are contiguous. The
    result stays at the position it was computed at; placing rotates it from there, which spares the rounding of a way
    back. Source: FusionRAG (arXiv 2601.12904), section 3.1, eq. 8 to 10.
    """
    before = joined(backbone, prefix, company)
    [made] = encoder.encode(backbone, [(chunk.text, Tokens(chunk.ids, chunk.offsets))], before)
    return replace(made, company=tuple(other.text for other in company))


def joined(backbone: Backbone, prefix: PrefixKV | None, chunks: Sequence[ChunkKV]) -> PrefixKV:
    """The KV of a prefix with chunks behind it, ``[L, Hk, P + sum n, D]``: keys rotated to contiguous positions."""
    row = 0 if prefix is None else prefix[0].shape[2]
    canvas = backbone.canvas(row + sum(map(len, chunks)))
    if prefix is not None:
        canvas.write(0, *prefix)
    for chunk in chunks:
        canvas.place(chunk, slice(0, len(chunk)), row, backbone.rotary)
        row += len(chunk)
    return canvas.keys[:, 0], canvas.values[:, 0]
