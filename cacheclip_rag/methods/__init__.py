"""Methods by name: how chunks are encoded, which tokens are recomputed, and how the question attends."""

from .table import FUSED, METHODS, Method, Positions, behind, check_ratio, resolve

__all__ = ["FUSED", "METHODS", "Method", "Positions", "behind", "check_ratio", "resolve"]
