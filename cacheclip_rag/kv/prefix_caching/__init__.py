"""Prefix caching: reuse of KV behind exactly the same tokens. One kind of cache per file."""

from .base import PrefixCache, PrefixCaching
from .blocks import PrefixBlocks
from .tree import DocumentTree

__all__ = ["DocumentTree", "PrefixBlocks", "PrefixCache", "PrefixCaching"]
