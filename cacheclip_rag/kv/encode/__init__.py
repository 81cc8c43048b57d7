"""Offline: ways of computing a chunk's KV once, at ingestion. One encoder a file."""

from .activations import WithActivations
from .base import Encoder, Text
from .blanks import Blanks
from .fused import fused
from .harvested import Harvested, Variant, Variants, disorder
from .isolated import Isolated

__all__ = [
    "Blanks",
    "Encoder",
    "Harvested",
    "Isolated",
    "Text",
    "Variant",
    "Variants",
    "WithActivations",
    "disorder",
    "fused",
]
