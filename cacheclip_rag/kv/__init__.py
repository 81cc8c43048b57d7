"""What a chunk's KV is, how it is computed, and where it is kept."""
