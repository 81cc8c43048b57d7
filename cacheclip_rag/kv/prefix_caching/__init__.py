"""Reuse that changes nothing: KV of the very tokens that stood before. One cache a file."""

from .base import ExactCache, ExactReuse
from .blocks import PrefixBlocks
from .tree import DocumentTree

__all__ = ["DocumentTree", "ExactCache", "ExactReuse", "PrefixBlocks"]
