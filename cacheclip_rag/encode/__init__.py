"""Offline: ways of computing a chunk's KV once, at ingestion."""

from .isolated import Encoder, Isolated

__all__ = ["Encoder", "Isolated"]
