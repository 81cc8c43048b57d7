"""What happened in a request: numbers, and how they are shown in a notebook, as a figure and at a terminal."""

from .record import ChunkUse, Report
from .token_sources import Fate, Fates, Run

__all__ = ["ChunkUse", "Fate", "Fates", "Report", "Run"]
