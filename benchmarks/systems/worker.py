"""One measurement in a process of its own: load a system, let it ingest passages, ask it questions, write the numbers.

    python worker.py JOB.json RESULT.json

Needs nothing but the standard library and what the system's module imports, since each peer has an environment of its
own. A system is a module of this folder with three functions:

* ``load(model, options, threads) -> system``: a folder with weights, loaded; ``options`` are the system's own;
* ``ingest(system, passages)``: what may be done before the first question, timed apart; nothing for most systems;
* ``ask(system, prompts, users, tokens) -> answers``: one `Asked` a prompt, in their order. Each of ``users`` asks one
  prompt after another; answers are greedy and exactly ``tokens`` long, whatever the model says about their end.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job["cores"])  # before anything starts threads
    sys.path.insert(0, str(Path(__file__).parent))
    module = import_module(job["module"])
    start = time.perf_counter()
    system = module.load(job["model"], job["options"], len(job["cores"]))
    loaded = time.perf_counter()
    module.ingest(system, job["passages"])
    ingested = time.perf_counter()
    module.ask(system, job["warm_up"], 1, 8)
    reset_peak()
    busy, own, begun = busy_seconds(), time.process_time(), time.perf_counter()
    answers = module.ask(system, job["prompts"], job["users"], job["tokens"])
    seconds = time.perf_counter() - begun
    others = busy_seconds() - busy - (time.process_time() - own)
    result = {
        "load_s": loaded - start,
        "ingest_s": ingested - loaded,
        "seconds": seconds,
        "first_s": [answer["first"] for answer in answers],
        "answer_s": [answer["total"] for answer in answers],
        "tokens": [answer["tokens"] for answer in answers],
        "texts": [answer["text"] for answer in answers],
        "peak_bytes": peak_bytes(),
        "others": max(0.0, others / seconds),
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


def reset_peak() -> None:
    """Let `peak_bytes` begin anew; where the system does not allow it, the peak of loading counts as well."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The highest resident memory of this process, weights included."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def busy_seconds() -> float:
    """CPU seconds that all processes of this machine have used; 0 where that cannot be read."""
    try:
        user, nice, system, _, _, interrupts, soft, *_ = Path("/proc/stat").read_text().split()[1:]
    except (OSError, ValueError):
        return 0.0
    return sum(map(int, (user, nice, system, interrupts, soft))) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
