"""Chunk KV: how it is encoded, which variants of it there are, and where it is kept."""
