"""Chunks and stores for the tests of `cacheclip_rag.store`."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cacheclip_rag.chunks import ChunkKV, Namespace
from cacheclip_rag.store import ChunkStore, DiskStore, files, format

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


def whole_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the files that are read into memory from now on."""
    sizes: list[int] = []
    empty = files.np.empty

    def counted(size: int, *rest: Any) -> Any:
        sizes.append(size - 1)
        return empty(size, *rest)

    monkeypatch.setattr(files.np, "empty", counted)
    return sizes


HOLES = 64 << 20  # bytes that are there by name only


def sparse(path: Path, data: bytes, tensor: str | None = None) -> None:
    """Make a file of these bytes and a hole behind them, of which the header says that it is ``tensor``'s."""
    length = int.from_bytes(data[:8], "little")
    if tensor is not None:
        header = json.loads(data[8 : 8 + length])
        end = len(data) - 8 - length
        header[tensor] = {"dtype": "U8", "shape": [HOLES], "data_offsets": [end, end + HOLES]}
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        data = len(raw).to_bytes(8, "little") + raw + data[8 + length :]
    path.write_bytes(data)
    os.truncate(path, len(data) + HOLES)


def holds(folder: Path, text: str) -> bool:
    return any(text.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())
