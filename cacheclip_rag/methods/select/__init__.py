"""Selectors: which context tokens to recompute. One per file."""
