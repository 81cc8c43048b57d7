"""The overhead of the chunk store: put and get against plain safetensors, and a folder of many entries.

Every get is paired with a plain load right after it, and every put with a plain save, so that other load on the machine
affects both; the ratio is the median of the pairs' ratios. After every load, all bytes are in tensors of their own:
``load`` reads the file and passes it to ``safetensors.torch.load``; ``load_file`` maps the file and reads lazily, so
its tensors are cloned. Files are in the page cache, so loading takes processor time of the calling thread, which is
what is measured for gets (other processes can still evict the processor's caches). Puts are measured in wall time.

    python benchmarks/store.py                     # 1, 8 and 64 MiB; 100,000 entries; one to two minutes
    python benchmarks/store.py --folder /mnt/disk  # on another file system than the temporary folder's
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from cacheclip_rag.chunks import ChunkKV, Namespace
from cacheclip_rag.store import DiskStore, files, format
from cacheclip_rag.store.admin import Administration

MIB = 1 << 20
NAMESPACE = Namespace({"format": format.FORMAT, "prefix": list(range(30)), "weights": "0" * 32, "tenant": ""})


def make(text: str, nbytes: int) -> ChunkKV:
    """KV of the shape of Qwen2.5-0.5B (24 layers, 2 KV heads of 64, bfloat16)."""
    tokens = max(1, nbytes // (2 * 24 * 2 * 64 * 2))
    keys, values = (torch.randn(24, 2, tokens, 64).bfloat16() for _ in range(2))
    return ChunkKV(text, torch.arange(tokens), torch.zeros(tokens, 2, dtype=torch.long), keys, values, 0)


def timed(work: Callable[[], Any]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def worked(work: Callable[[], Any]) -> float:
    """Milliseconds of this thread's processor time."""
    start = time.thread_time()
    work()
    return (time.thread_time() - start) * 1e3


def timed_both(work: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of wall time, and of this process's processor time."""
    processor = time.process_time()
    clock = timed(work)
    return clock, (time.process_time() - processor) * 1e3


def against_safetensors(folder: Path, mebibytes: int, rounds: int) -> str:
    text = "word " * (mebibytes * MIB // 12_288)  # a token a word
    chunk, key = make(text, mebibytes * MIB), NAMESPACE.key(text)
    synced, unsynced = (DiskStore(folder / f"{sync}", NAMESPACE, 1 << 40, sync=sync) for sync in (True, False))
    plain = folder / "plain.safetensors"
    tensors = {"keys": chunk.keys, "values": chunk.values, "ids": chunk.ids, "offsets": chunk.offsets}
    puts, gets = [], []
    loads = max(4 * rounds, 400 // mebibytes)
    for _ in range(rounds):
        puts.append(
            (
                timed(lambda: synced.put(key, chunk)),
                timed(lambda: unsynced.put(key, chunk)),
                timed(lambda: safetensors.torch.save_file(tensors, str(plain))),
            )
        )
        synced.delete([key])
        unsynced.delete([key])
        plain.unlink()
    unsynced.put(key, chunk)
    safetensors.torch.save_file(tensors, str(plain))
    for plainly in (
        lambda: safetensors.torch.load(plain.read_bytes()),
        lambda: {name: tensor.clone() for name, tensor in safetensors.torch.load_file(str(plain)).items()},
    ):
        gets.append([(worked(lambda: unsynced.get(key)), worked(plainly)) for _ in range(loads)])
    unsynced.delete([key])
    cells = [shown(column) for column in zip(*puts, strict=True)]
    cells.append(ratio([(mine, theirs) for _, mine, theirs in puts]))
    cells.append(shown([mine for mine, _ in gets[0]]))
    for pairs in gets:
        cells += [shown([theirs for _, theirs in pairs]), ratio(pairs)]
    return f"| {mebibytes} MiB | {' | '.join(cells)} |"


def shown(milliseconds: Sequence[float]) -> str:
    """Their median."""
    median = statistics.median(milliseconds)
    return f"{median:.1f} ms" if median >= 10 else f"{median:.2f} ms"


def ratio(pairs: Sequence[tuple[float, float]]) -> str:
    return f"{statistics.median(mine / theirs for mine, theirs in pairs):.2f}"


def many(folder: Path, count: int) -> list[str]:
    store = DiskStore(folder, NAMESPACE, 1 << 40, sync=False)
    chunk, keys = make("", 1), []
    for number in range(count):
        text = f"chunk {number} " + "word " * 20
        keys.append(NAMESPACE.key(text))
        named = ChunkKV(text, chunk.ids, chunk.offsets, chunk.keys, chunk.values, 0)
        files.publish(store.path / f"{keys[-1]}{format.SUFFIX}", format.dump(keys[-1], named, NAMESPACE), sync=False)
    rows = []

    def row(what: str, work: Callable[[], Any], times: int = 1) -> None:
        taken = [timed_both(work) for _ in range(times)]
        cells = [
            f"{one / 1e3:.2f} s" if one >= 1000 else f"{one:.3g} ms"
            for one in map(statistics.median, zip(*taken, strict=True))
        ]
        rows.append(f"| {what} | {' | '.join(cells)} |")

    opened: list[DiskStore] = []
    row("open (every header is read)", lambda: opened.append(DiskStore(folder, NAMESPACE, 1 << 40, sync=False)))
    store = opened[0]
    assert store.stats().entries == count
    row("look up a thousand keys", lambda: [key in store for key in keys[:1000]])
    some = iter(keys)
    row("get one", lambda: store.get(next(some)), 500)
    time.sleep(2.1)  # a folder that changed a moment ago is listed again in any case
    store.refresh()
    row("refresh, nothing changed", store.refresh, 50)
    row("put one", lambda: store.put(NAMESPACE.key("another"), make("another", 1)))
    DiskStore(folder, NAMESPACE, 1 << 40, sync=False).delete([keys[0]])
    row("refresh, another process removed one", store.refresh)
    row("scan (cacheclip store stats)", lambda: Administration(folder).usage())
    small = DiskStore(folder, NAMESPACE, store.stats().nbytes, sync=False)
    row("put one into a full store", lambda: small.put(NAMESPACE.key("last"), make("last", MIB)))
    rows[-1] = rows[-1].replace("full store", f"full store: evicts {small.stats().evicted:,}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the stores; default: the temporary folder")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 8, 64], help="MiB")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--entries", type=int, default=100_000)
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        if options.sizes:
            print(
                "| entry | put, synced | put, not synced | save_file | ratio | get, verified | load | ratio "
                "| load_file, cloned | ratio |"
            )
            print("|---|---|---|---|---|---|---|---|---|---|")
        for size in options.sizes:
            print(against_safetensors(Path(name), size, options.rounds), flush=True)
            gc.collect()
        if options.entries:
            print(f"\n| {options.entries:,} entries | by the clock | processor time |\n|---|---|---|")
            print("\n".join(many(Path(name) / "many", options.entries)))


if __name__ == "__main__":
    main()
