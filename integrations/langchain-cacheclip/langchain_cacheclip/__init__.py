"""LangChain on local models that read a document chunk once and keep its KV cache."""

from .chat_models import ChatCacheClip
from .compressors import CacheClipCompressor, cacheclip_warm
from .vectorstores import CacheClipVectorStore

__all__ = ["CacheClipCompressor", "CacheClipVectorStore", "ChatCacheClip", "cacheclip_warm"]
