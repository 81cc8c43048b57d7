"""Chunks and stores for the tests of `cacheclip_rag.store`."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cacheclip_rag.chunks import ChunkKV, Namespace
from cacheclip_rag.store import ChunkStore, DiskStore, format

MODEL, OTHER = (Namespace({"format": format.FORMAT, "model": name, "tenant": ""}) for name in ("one", "two"))
KEYED, OTHER_SECRET = replace(MODEL, secret=b"correct horse"), replace(MODEL, secret=b"battery staple")
HUGE = 1 << 40


def make(text: str, tokens: int = 5, dtype: torch.dtype = torch.bfloat16, seed: int = 0, position: int = 16) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, tokens, 4)
    return ChunkKV(
        text=text,
        ids=torch.randint(0, 50_000, (tokens,), generator=generator),
        offsets=torch.arange(2 * tokens).reshape(tokens, 2),
        keys=torch.randn(shape, generator=generator).to(dtype),
        values=torch.randn(shape, generator=generator).to(dtype),
        position=position,
    )


SIZE = len(format.dump(MODEL.key("text 0"), make("text 0"), MODEL))
"""Bytes of a chunk's file, give or take what its text is longer or shorter."""


def same(a: ChunkKV | None, b: ChunkKV) -> bool:
    """Bit for bit."""

    def bits(chunk: ChunkKV) -> list[Any]:
        tensors = (chunk.ids, chunk.offsets, chunk.keys, chunk.values)
        return [(t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes()) for t in tensors]

    return a is not None and (a.text, a.position) == (b.text, b.position) and bits(a) == bits(b)


def open_disk(folder: Path, namespace: Namespace = MODEL, cap: int = HUGE) -> DiskStore:
    return DiskStore(folder, namespace, cap, sync=False)


def put(store: DiskStore, text: str, **options: Any) -> str:
    """Its key."""
    key = store.namespace.key(text)
    assert store.put(key, make(text, **options))
    return key


def fill(store: ChunkStore, count: int, **options: Any) -> list[tuple[str, ChunkKV]]:
    chunks = [make(f"chunk number {i}", seed=i, **options) for i in range(count)]
    for chunk in chunks:
        assert store.put(MODEL.key(chunk.text), chunk)
    return [(MODEL.key(chunk.text), chunk) for chunk in chunks]


def path_of(store: DiskStore, key: str) -> Path:
    return store.path / f"{key}{format.SUFFIX}"


def bytes_on_disk(store: DiskStore) -> int:
    """Of this store's chunks."""
    return sum(file.stat().st_size for file in store.path.glob(f"*{format.SUFFIX}"))


def total(folder: Path) -> int:
    """Bytes of all files that a cap counts, whosever they are."""
    counted = (format.SUFFIX, ".bad")
    return sum(p.stat().st_size for p in folder.rglob("*") if p.suffix in counted or ".tmp-" in p.name)


def age(path: Path, seconds: float) -> None:
    """Let it be as if the file had last been used so many seconds ago."""
    os.utime(path, (time.time() - seconds, time.time() - seconds), follow_symlinks=False)


def later(folder: Path) -> None:
    """Let the folder's time of change be another one, whatever the clock's grain."""
    before = folder.stat().st_mtime_ns
    os.utime(folder, ns=(before, before + 1_000_000))
