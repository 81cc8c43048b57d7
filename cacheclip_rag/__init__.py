"""RAG answers from cached KV: each chunk is read once, at ingestion, and reused wherever it stands in a prompt.

Names are imported on first use, so that ``cacheclip --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chunks import ChunkKV
    from .corpus.corpus import Ensured
    from .engine import Answer, Engine
    from .errors import CacheClipError, ConfigurationError, NotComposable, PromptError, StoreError, WeightsError
    from .methods import METHODS, Method
    from .model.backbone import Backbone
    from .prefill.audit import Audit
    from .prompt import RenderedPrompt
    from .report import ChunkUse, Report
    from .serving.callers import calling
    from .serving.decoding import TextStream

_HOMES = {
    "METHODS": "methods",
    "Answer": "engine",
    "Audit": "prefill.audit",
    "Backbone": "model.backbone",
    "CacheClipError": "errors",
    "ChunkKV": "chunks",
    "ChunkUse": "report",
    "ConfigurationError": "errors",
    "Engine": "engine",
    "Ensured": "corpus.corpus",
    "Method": "methods",
    "NotComposable": "errors",
    "PromptError": "errors",
    "RenderedPrompt": "prompt",
    "Report": "report",
    "Stats": "serving.stats",
    "StoreError": "errors",
    "TextStream": "serving.decoding",
    "WeightsError": "errors",
    "calling": "serving.callers",
}

__all__ = [
    "METHODS",
    "Answer",
    "Audit",
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
    "RenderedPrompt",
    "Report",
    "Stats",
    "StoreError",
    "TextStream",
    "WeightsError",
    "calling",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
