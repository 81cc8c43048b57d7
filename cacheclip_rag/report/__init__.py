"""The report of a request: its numbers, and how a notebook, a figure and a terminal show them."""

from ..deprecation import renamed_names
from .record import ChunkUse
from .shown import Report
from .token_sources import Run, TokenSource, TokenSources

__all__ = ["ChunkUse", "Report", "Run", "TokenSource", "TokenSources"]

__getattr__ = renamed_names(
    __name__,
    {"Fate": (f"{__name__}.token_sources", "TokenSource"), "Fates": (f"{__name__}.token_sources", "TokenSources")},
)
