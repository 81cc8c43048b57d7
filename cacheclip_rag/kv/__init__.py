"""Chunk KV: how it is encoded, which variants of it exist, and where it is kept."""
