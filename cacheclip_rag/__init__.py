"""cacheclip_rag: a RAG application's LLM stops re-reading the same documents.

Names are imported when they are first used, so that ``cacheclip --help`` need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import Backbone
    from .chunks import ChunkKV
    from .decoding import TextStream
    from .engine import Answer, Engine
    from .errors import CacheClipError, ConfigurationError, NotComposable, PromptError, StoreError, WeightsError
    from .fusing import Ensured
    from .methods import METHODS, Method
    from .report import ChunkUse, Report

_HOMES = {
    "METHODS": "methods",
    "Answer": "engine",
    "Backbone": "backbone",
    "CacheClipError": "errors",
    "ChunkKV": "chunks",
    "ChunkUse": "report",
    "ConfigurationError": "errors",
    "Engine": "engine",
    "Ensured": "fusing",
    "Method": "methods",
    "NotComposable": "errors",
    "PromptError": "errors",
    "Report": "report",
    "Stats": "stats",
    "StoreError": "errors",
    "TextStream": "decoding",
    "WeightsError": "errors",
}

__all__ = [
    "METHODS",
    "Answer",
    "Backbone",
    "CacheClipError",
    "ChunkKV",
    "ChunkUse",
    "ConfigurationError",
    "Engine",
    "Ensured",
    "Method",
    "NotComposable",
    "PromptError",
    "Report",
    "Stats",
    "StoreError",
    "TextStream",
    "WeightsError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
