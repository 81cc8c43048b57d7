"""Offline: ways of computing a chunk's KV once, at ingestion. One encoder a file."""

from .activations import WithActivations
from .base import Encoder, Text
from .blanks import Blanks
from .fused import fused
from .harvested import Harvested, HarvestedVariant, HarvestedVariants, disorder
from .isolated import Isolated

__all__ = [
    "Blanks",
    "Encoder",
    "Harvested",
    "HarvestedVariant",
    "HarvestedVariants",
    "Isolated",
    "Text",
    "WithActivations",
    "disorder",
    "fused",
]
