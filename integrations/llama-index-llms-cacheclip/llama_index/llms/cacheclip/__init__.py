"""LlamaIndex LLM and ingestion step that read a document chunk once and keep its KV cache."""

from .base import CacheClipLLM
from .events import CacheClipReuseEvent
from .transform import CacheClipTransform

__all__ = ["CacheClipLLM", "CacheClipReuseEvent", "CacheClipTransform"]
