"""Five chunks and an engine that takes fused variants, for the tests of fusing."""

from __future__ import annotations

from typing import Any

import torch
from oracles import watch
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import Backbone, Engine
from cacheclip_rag.chunks import ChunkKV
from cacheclip_rag.methods import resolve

A, B, C, D, E = PASSAGES
PREFIX = "Read these passages.\n"
TAIL = "\n\nWho drove the last train?"
NAIVE = resolve("naive", prefix=PREFIX)
FUSED = resolve(NAIVE, fused=True)


def engine(backbone: Backbone | None = None, **options: Any) -> Engine:
    return Engine(backbone or tiny_backbone(), method=FUSED, prefix=PREFIX, **options)


def variant(engine: Engine, text: str, context: tuple[str, ...]) -> ChunkKV:
    """The chunk's KV as it was computed behind these chunks, in one text with them or each by itself."""
    library = engine.library
    found = [library.get(library.key(text, context, in_sequence=joined)) for joined in (True, False)]
    return next(chunk for chunk in found if chunk is not None)


def contexts(engine: Engine, text: str) -> list[tuple[str, ...]]:
    """What a prompt may choose from: the chunk by itself, then its fused variants, as they came."""
    return [(), *engine.fused(text)]


def ids(*texts: str) -> torch.Tensor:
    return torch.cat([tiny_backbone().tokenise(text).ids for text in texts])


def taken(engine: Engine, *texts: str) -> list[tuple[str, ...]]:
    """The contexts of the variants that a prompt of these chunks gets."""
    text = engine.backbone.shared_prefix() + "\n\n".join(texts) + TAIL
    _, request, _ = watch(engine, engine.method, text)
    return [chunk.context for chunk in request.chunks]
