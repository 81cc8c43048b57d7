"""Uses an engine as badly as it can be: ``python tests/torture_engine.py`` (some forty minutes).

It is interrupted, forked, killed, asked by many threads at once, made to forget in a race, and its memory is watched.
`test_torture_engine.py`, `test_forks.py` and `test_interrupts.py` run shorter versions. Only public functions of an
engine and the command line are called; what it answers is compared with what it answers undisturbed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch
from torture_forgetting import forgetting
from torture_kills import kill_engines, kill_ingestions
from torture_memory import memory
from torture_serving import forks, interrupts
from torture_threads import threads


def main() -> int:
    parser = argparse.ArgumentParser(description="Interrupt, fork and kill a busy engine; count what is lost or hangs.")
    parser.add_argument("--interrupts", type=int, default=2_000)
    parser.add_argument("--forks", type=int, default=200)
    parser.add_argument("--kills", type=int, default=200, help="of processes with an engine")
    parser.add_argument("--ingestions", type=int, default=50, help="kills of `cacheclip ingest`")
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--forgettings", type=int, default=1_000)
    parser.add_argument("--requests", type=int, default=2_000, help="while memory is watched")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", nargs="*", default=[], help="names of what is printed, as in `--only forks memory`")
    options = parser.parse_args()
    logging.disable()
    torch.set_num_threads(1)
    seed, good = options.seed, True
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        folder = Path(name)
        for title, run in {
            "forgetting": lambda: forgetting(folder, options.forgettings, seed),  # before there are other threads
            "engines killed": lambda: kill_engines(folder, options.kills, seed),
            "ingestions killed": lambda: kill_ingestions(folder, options.ingestions, seed),
            "interrupts": lambda: interrupts(options.interrupts, seed),
            "forks": lambda: forks(folder, options.forks, seed),
            "threads": lambda: threads(folder, options.threads, seed=seed),
            "memory": lambda: memory(options.requests, options.requests // 2, seed),
        }.items():
            if options.only and title not in options.only:
                continue
            start = time.monotonic()
            tally = run()
            good &= tally.good
            print(f"{title} ({time.monotonic() - start:.0f} s): {tally}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
