"""Five chunks and an engine that takes fused variants, for the tests of fusing."""

from __future__ import annotations

from typing import Any

import torch
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import Backbone, Engine
from cacheclip_rag.methods import resolve

A, B, C, D, E = PASSAGES
PREFIX = "Read these passages.\n"
TAIL = "\n\nWho drove the last train?"
NAIVE = resolve("naive", prefix=PREFIX)
FUSED = resolve(NAIVE, fused=True)


def engine(backbone: Backbone | None = None, **options: Any) -> Engine:
    return Engine(backbone or tiny_backbone(), method=FUSED, prefix=PREFIX, **options)


def variants(engine: Engine) -> Any:
    return engine._encodings.reuse(engine.method.encode).fused


def ids(*texts: str) -> torch.Tensor:
    return torch.cat([tiny_backbone().tokenise(text).ids for text in texts])


def keys(engine: Engine, *texts: str) -> list[str]:
    return [engine.library.key(text) for text in texts]


def fused_of(engine: Engine) -> Any:
    return variants(engine).of
