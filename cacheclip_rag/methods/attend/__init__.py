"""Attention variants of the computed rows, for methods that change how these weigh the context. One per file."""
