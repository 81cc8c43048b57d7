"""Encoders: ways to compute a chunk's KV ahead of prompts. One encoder per file."""

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
