"""Prefix caching: KV of the very tokens that stood before. One cache a file."""

from .base import PrefixCache, PrefixCaching
from .blocks import PrefixBlocks
from .tree import DocumentTree

__all__ = ["DocumentTree", "PrefixBlocks", "PrefixCache", "PrefixCaching"]
