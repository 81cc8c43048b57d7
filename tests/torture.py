"""Breaks the chunk store on purpose and counts what is lost or wrong: ``python tests/torture.py`` (minutes).

`test_torture.py` runs shorter versions of it. Every part returns a `Tally`; all chunks are made from their numbers, so
what a store serves can be compared with what must be there whoever wrote it.
"""

from __future__ import annotations

import argparse
import errno
import logging
import sys
import tempfile
import time
from pathlib import Path

from torture_damage import damage
from torture_faults import faults, full, power_cuts
from torture_harness import Tally
from torture_processes import kill_points, kills, several_processes


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the chunk store on purpose; count what is lost or wrong.")
    parser.add_argument("--rounds", type=int, default=200, help="kills at random moments, and power cuts")
    parser.add_argument("--inputs", type=int, default=20_000, help="damaged files")
    parser.add_argument("--seconds", type=float, default=30.0, help="of several processes on one folder")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--folder", type=Path, help="where to work (a temporary folder otherwise)")
    options = parser.parse_args()
    everything = Tally()
    logging.disable()  # every fault is reported as it should be, thousands of times
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="torture-") as name:
        folder = Path(name)
        errors = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EINTR, errno.EMFILE)
        for title, run in {
            "an error at each system call": lambda: faults(folder, errors),
            "full disks": lambda: full(folder, mount=True),
            "killed at each system call": lambda: kill_points(folder),
            "killed at random moments": lambda: kills(folder, options.rounds, options.seed),
            "power cut": lambda: power_cuts(folder, options.rounds * 5, options.seed),
            "damaged and forged files": lambda: damage(folder, options.inputs, options.seed),
            "several processes": lambda: several_processes(folder, options.seconds, options.processes, options.seed),
            "several processes, half of them killed": lambda: several_processes(
                folder / "k", options.seconds / 3, options.processes, options.seed, kill=True
            ),
        }.items():
            start = time.monotonic()
            tally = run()
            everything.add(tally)
            print(f"{title} ({time.monotonic() - start:.0f} s): {tally}", flush=True)
    print(f"all: {everything}")
    return 0 if everything.good else 1


if __name__ == "__main__":
    sys.exit(main())
