"""Recompute steps: how the chosen rows go through the layers. One per file."""
