"""How many chunks are encoded together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

TOGETHER = {"cpu": 2_000, "gpu": 16_000}
"""How many characters of chunks share a forward: beyond, little is gained, and requests wait longer."""

MOST = 64
"""How many chunks at most, so that progress shows where all of them are there already."""


def batch_characters(device: torch.device) -> int:
    """`TOGETHER` of this device."""
    return TOGETHER["cpu" if device.type == "cpu" else "gpu"]


def batches(texts: Iterable[str], characters: int, weight: Callable[[str], int] = len) -> Iterator[list[str]]:
    """Neighbouring texts, cut where they would be more than so many characters together, each counted as ``weight``."""
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
    """The groups; once one is done with, ``progress`` is told of each of its texts how many there were so far."""
    done = 0
    for group in groups:
        yield group
        for _ in group:
            done += 1
            if progress is not None:
                progress(done)
