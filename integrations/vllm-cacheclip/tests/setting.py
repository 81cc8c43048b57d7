"""One engine in a process of its own: ``python setting.py '{"kind": "qwen3", ...}'`` prints what it found, as JSON.

vLLM holds one engine per process, so that every setting of it is tried in another one.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from serving import PASSAGES, Served, save_tiny

ORDERS = [PASSAGES[k:] + PASSAGES[:k] for k in range(5)]


def in_another_process(environment: dict[str, str] | None = None, **setting: Any) -> dict[str, Any]:
    """What `found` returns for this setting. Raises RuntimeError with the output's end if the engine does not start."""
    command = [sys.executable, __file__, json.dumps(setting)]
    env = os.environ | (environment or {})
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)
    if run.returncode:
        raise RuntimeError(run.stderr[-4000:] or run.stdout[-4000:])
    return dict(json.loads(run.stdout.strip().splitlines()[-1]))


def found(kind: str = "llama", reuse: bool = True, tokens: int = 12, **options: Any) -> dict[str, Any]:
    """How many requests are equal to plain vLLM or to themselves one after another, and the plain answers."""
    with tempfile.TemporaryDirectory() as folder:
        served = Served(save_tiny(Path(folder) / "model", kind), Path(folder) / "store" if reuse else None, **options)
        prompts = [served.prompt(order, head=head) for order in ORDERS for head in ("", "Read.\n\n")]
        plain = [answer for answer, _ in served.ask(prompts, tokens, reuse=False)]
        if not reuse:
            return {"plain": plain}
        served.encode(PASSAGES)
        whole = served.ask(prompts, tokens, recompute_ratio=1.0)
        single = [served.prompt([passage]) for passage in PASSAGES]
        alone = [answer for answer, _ in served.ask(single, tokens, reuse=False)]
        placed = served.ask(single, tokens, method="naive")
        kinds: list[dict[str, Any]] = [{}, {"reuse": False}, {"recompute_ratio": 1.0}, {"method": "naive"}]
        jobs = [(ids, kind) for ids in prompts for kind in kinds]
        random.Random(0).shuffle(jobs)
        each = [served.ask([ids], tokens, **kind)[0][0] for ids, kind in jobs]
        together = served.ask_each(jobs, tokens)
        again = [answer for answer, _ in served.ask(prompts, tokens, reuse=False)]
        return {
            "plain": plain,
            "again": again,
            "whole": equal(plain, whole),
            "single": equal(alone, placed),
            "together": equal(each, together),
            "auto": [answer for answer, _ in served.ask(prompts, tokens)],
            "reused": sum(
                report["tokens"].get("adjusted", 0) for _, report in served.ask(prompts) if "tokens" in report
            ),
            "preemptions": served.preemptions(),
            "fallbacks": sorted({reason for _, report in whole for reason in report.get("fallbacks", ())}),
        }


def equal(expected: list[list[int]], got: list[tuple[list[int], dict[str, Any]]]) -> list[bool]:
    return [one == answer for one, (answer, _) in zip(expected, got, strict=True)]


if __name__ == "__main__":
    print(json.dumps(found(**json.loads(sys.argv[1]))))
