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

from serving import PASSAGES, Served, asking, save_tiny

from cacheclip_rag.methods import resolve

ORDERS = [PASSAGES[k:] + PASSAGES[:k] for k in range(5)]


def in_another_process(environment: dict[str, str] | None = None, **setting: Any) -> dict[str, Any]:
    """What `found` returns for this setting. Raises RuntimeError with the output's end if the engine does not start."""
    command = [sys.executable, __file__, json.dumps(setting)]
    env = os.environ | (environment or {})
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env)
    if run.returncode:
        raise RuntimeError(run.stderr[-4000:] or run.stdout[-4000:])
    return dict(json.loads(run.stdout.strip().splitlines()[-1]))


def found(
    kind: str = "llama", reuse: bool = True, tokens: int = 12, method: str = "auto", **options: Any
) -> dict[str, Any]:
    """How many requests are equal to plain vLLM or to themselves one after another, and the plain answers."""
    with tempfile.TemporaryDirectory() as folder:
        options["extra"] = {"method": method, **options.get("extra", {})}
        served = Served(save_tiny(Path(folder) / "model", kind), Path(folder) / "store" if reuse else None, **options)
        prompts = [served.prompt(order, head=head) for order in ORDERS for head in ("", "Read.\n\n")]
        plain = [answer for answer, _ in served.ask(prompts, tokens, reuse=False)]
        if not reuse:
            return {"plain": plain}
        served.encode(PASSAGES, resolve(method))
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


def meeting(**options: Any) -> dict[str, Any]:
    """Requests that share a beginning with one that vLLM computes piece by piece, in the very steps where it does."""
    with tempfile.TemporaryDirectory() as folder:
        served = Served(save_tiny(Path(folder) / "model"), Path(folder) / "store", **options)
        served.encode(PASSAGES)
        engine, same, reasons = served.llm.llm_engine, [], list[str]()
        for steps in range(8):
            beginning = f"A beginning that no prompt has had so far, number {steps}. " * 14
            first, second = (served.prompt(order, head=beginning) for order in ORDERS[:2])
            engine.add_request("plain", {"prompt_token_ids": first}, asking({"reuse": False}, max_tokens=12))
            for _ in range(steps):
                engine.step()
            engine.add_request("ours", {"prompt_token_ids": second}, asking({"recompute_ratio": 1.0}, max_tokens=12))
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished and output.request_id == "ours":
                        answer = list(output.outputs[0].token_ids)
                        reasons += output.kv_transfer_params["cacheclip"]["fallbacks"]
            assert served.llm.reset_prefix_cache()
            same.append(answer == served.ask([second], reuse=False)[0][0])
            assert served.llm.reset_prefix_cache()
        return {"same": same, "fallbacks": reasons}


def equal(expected: list[list[int]], got: list[tuple[list[int], dict[str, Any]]]) -> list[bool]:
    return [one == answer for one, (answer, _) in zip(expected, got, strict=True)]


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    what = {"found": found, "meeting": meeting}[given.pop("what", "found")]
    print(json.dumps(what(**given)))
