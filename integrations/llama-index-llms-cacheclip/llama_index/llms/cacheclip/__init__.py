"""LlamaIndex LLM, ingestion step and vector store that read a document chunk once and keep its KV cache."""

from .base import CacheClipLLM
from .events import CacheClipReuseEvent
from .transform import CacheClipTransform
from .vector_store import CacheClipVectorStore

__all__ = ["CacheClipLLM", "CacheClipReuseEvent", "CacheClipTransform", "CacheClipVectorStore"]
