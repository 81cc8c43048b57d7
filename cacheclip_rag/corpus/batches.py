"""Batches of chunks that are encoded in one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

TOGETHER = {"cpu": 2_000, "gpu": 16_000}
"""Characters of chunks per forward: more gains little, and makes requests wait longer for the lock."""

MOST = 64
"""Chunks per batch at most, so that progress moves even if all of them are stored already."""


def batch_characters(device: torch.device) -> int:
    """Characters of chunks per forward on this device (`TOGETHER`)."""
    return TOGETHER["cpu" if device.type == "cpu" else "gpu"]


def batches(texts: Iterable[str], characters: int, weight: Callable[[str], int] = len) -> Iterator[list[str]]:
    """Consecutive texts in batches of at most ``characters`` in total, each text counted as ``weight(text)``."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and (size + weight(text) > characters or len(batch) == MOST):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += weight(text)
    if batch:
        yield batch


def with_progress(groups: Iterable[Sequence[str]], progress: Callable[[int], None] | None) -> Iterator[Sequence[str]]:
    """Yield the groups; after each one, call ``progress(done)`` once per text in it."""
    done = 0
    for group in groups:
        yield group
        for _ in group:
            done += 1
            if progress is not None:
                progress(done)
