"""cacheclip_rag: a RAG application's LLM stops re-reading the same documents."""

from .backbone import Backbone
from .chunks import ChunkKV
from .decoding import TextStream
from .engine import Answer, Engine, Ensured
from .errors import CacheClipError, ConfigurationError, NotComposable, PromptError, StoreError, WeightsError
from .methods import METHODS, Method
from .report import ChunkUse, Report

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
    "StoreError",
    "TextStream",
    "WeightsError",
]
