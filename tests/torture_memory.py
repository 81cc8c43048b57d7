"""Memory over many requests: ``python tests/torture_memory.py``; after a warm-up it stays where it is.

`test_torture_engine.py` runs a shorter version, in a process of its own: what counts is all that a process holds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tiny import byte_tokenizer, tiny_backbone, tiny_model
from torture_counts import Counts, passage

from cacheclip_rag import Backbone, Engine

MIB = 1 << 20
BOUND = 8 << 10
"""Bytes of resident memory that a request may add after the warm-up; the KV of one prompt of these is 75 times that."""

METHODS = (
    *("auto", "cacheclip", "query_guided", "fusionrag", "naive", "full", "cachecraft:variants=2"),
    *("prefix-cache", "ragcache"),
)
KEPT = 20
"""Requests after which a request's chunks are forgotten."""


def resident() -> int:
    """Bytes of this process in memory, without what was freed and waits to be used again."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # of glibc
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def use(folder: Path, requests: int, warm_up: int, seed: int = 0) -> dict[str, Any]:
    """Ask, announce, ingest and forget, always something new; the resident memory (bytes) at eleven moments behind the
    warm-up.
    """
    rng, seen = random.Random(seed), []
    options: dict[str, Any] = {"store": folder, "memory_bytes": 8 * MIB, "disk_bytes": 16 * MIB}
    auxiliary = Backbone(tiny_model("llama", seed=1), byte_tokenizer())
    with Engine(tiny_backbone(), auxiliary=auxiliary, method="auto", fuse_when_idle=True, **options) as engine:
        for number in range(warm_up + requests):
            if number >= warm_up and (number - warm_up) % max(1, requests // 10) == 0:
                engine.flush()
                seen.append(resident())
            new, document = [passage(number * 10 + n) for n in range(2)], f"document {number}"
            engine.ensure(new, document=document)
            texts = [*new, passage(max(0, number - rng.randrange(KEPT)) * 10)]
            rng.shuffle(texts)
            messages = [{"role": "user", "content": "\n\n".join([*texts, f"Question {number}?"])}]
            prompt, method = engine.backbone.chat(messages), rng.choice(METHODS)
            engine.hint(texts, f"Question {number}?", caller=number)
            match number % 4:
                case 0 | 1:
                    engine.generate(prompt, method=method, max_new_tokens=3, caller=number)
                case 2:
                    with engine.stream(prompt, method=method, max_new_tokens=20) as stream:
                        next(stream, None)
                case 3:
                    engine.prefill(prompt, method=method)
            engine.ensure_later([passage(number * 10 + 5)])
            if (old := number - KEPT) >= 0:
                engine.forget_document(f"document {old}")
                engine.forget([passage(old * 10 + 5)])
        engine.flush()
        seen.append(resident())
        stats = engine.stats()
    return {"seen": seen, "fallbacks": stats.fallbacks}


def memory(requests: int = 2_000, warm_up: int = 1_000, seed: int = 0, bound: int = BOUND) -> Counts:
    """So many requests in a process of their own; ``bound``: bytes that each may add."""
    counts = Counts()
    command = [sys.executable, __file__, *f"--requests {requests} --warm-up {warm_up} --seed {seed} --json".split()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        counts.failed.append(done.stderr[-2000:])
        return counts
    result = json.loads(done.stdout)
    seen = result["seen"]
    growth = (sum(seen[-3:]) - sum(seen[:3])) / 3
    counts.done["requests"] = requests
    counts.done["MiB before"], counts.done["MiB after"] = round(seen[0] / MIB), round(seen[-1] / MIB)
    counts.done["bytes of growth a request"] = round(growth / requests)
    counts.expect(growth / requests <= bound, f"it grows by {growth / requests:.0f} bytes a request: {seen}")
    # That reuse would have taken longer is a choice, and a store this small evicts a chunk now and then.
    others = set(result["fallbacks"]) - {"full prefill", "chunk"}
    counts.expect(not others, f"fallbacks: {result['fallbacks']}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Use an engine in every way; print how much memory the process holds.")
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--warm-up", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.disable()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        result = use(Path(name), options.requests, options.warm_up, options.seed)
    if options.json:
        print(json.dumps(result))
        return
    steps = [later - former for former, later in pairwise(result["seen"])]
    print(f"{[round(seen / MIB, 1) for seen in result['seen']]} MiB; steps {steps} bytes; {result['fallbacks']}")


if __name__ == "__main__":
    main()
