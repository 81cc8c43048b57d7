"""LlamaIndex postprocessor that gets the KV of retrieved chunks ready for `CacheClipLLM`."""

from .base import CacheClipPostprocessor

__all__ = ["CacheClipPostprocessor"]
