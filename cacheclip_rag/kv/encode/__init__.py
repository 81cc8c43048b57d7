"""Encoders: ways to compute a chunk's KV ahead of prompts. One encoder per file."""

from .activations import WithActivations
from .base import Encoder, Text, soft_tokens
from .blanks import Blanks
from .fused import fused
from .harvested import Harvested, HarvestedVariant, HarvestedVariants, disorder
from .isolated import Isolated
from .linked import Linked
from .packet import Packet

__all__ = [
    "Blanks",
    "Encoder",
    "Harvested",
    "HarvestedVariant",
    "HarvestedVariants",
    "Isolated",
    "Linked",
    "Packet",
    "Text",
    "WithActivations",
    "disorder",
    "fused",
    "soft_tokens",
]
