"""LlamaIndex LLM and ingestion step that read a document chunk once and keep its KV cache."""

from .base import CacheClipLLM
from .transform import CacheClipTransform

__all__ = ["CacheClipLLM", "CacheClipTransform"]
