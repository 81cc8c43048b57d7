"""Untrusted text, made safe to print at a terminal: file names, file headers, messages that quote them."""

from __future__ import annotations


def plain(text: object) -> str:
    """On one line, and without what a terminal would take for a command: a name may be anything but "/" and NUL."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in str(text)).split())
