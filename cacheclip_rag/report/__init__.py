"""What happened in a request: numbers, and how they are shown in a notebook, as a figure and at a terminal."""

from .fates import Fate, Fates, Run
from .record import ChunkUse, Report

__all__ = ["ChunkUse", "Fate", "Fates", "Report", "Run"]
