"""Reuse methods: how chunks are encoded, which tokens are recomputed, and how the question attends."""

from ..deprecation import renamed_names
from .method import Method, Positions, check_ratio
from .table import FUSED, METHODS, register, resolve, with_prefix

__all__ = ["FUSED", "METHODS", "Method", "Positions", "check_ratio", "register", "resolve", "with_prefix"]

__getattr__ = renamed_names(__name__, {"behind": (f"{__name__}.table", "with_prefix")})
