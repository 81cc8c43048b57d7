"""Many threads at once, each with other methods: every answer is the one it is alone.

`test_torture_engine.py` runs a shorter version. Only public functions of an engine are called.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path

from exempt import NEEDS_A_FOLDER, but
from tiny import PASSAGES, byte_tokenizer, tiny_backbone, tiny_model
from torture_counts import Counts, passage

from cacheclip_rag import Backbone, Engine

PATIENCE = 600.0
"""Seconds after which something hangs."""

WAYS = ("generate", "stream", "stream and leave", "prefill")


def threads(folder: Path, count: int = 64, requests: int = 10, prompts: int = 6, seed: int = 0) -> Counts:
    """``count`` threads begin at the same moment; each asks ``requests`` prompts by methods drawn at random, while
    other chunks are encoded, announced and forgotten. Float32, greedy.
    """
    counts, rng = Counts(), random.Random(seed)
    # The answers of cachecraft depend on the prompts before.
    methods = [name for name in but(NEEDS_A_FOLDER) if name != "cachecraft"]
    auxiliary = Backbone(tiny_model("llama", seed=1), byte_tokenizer())
    with Engine(
        tiny_backbone(), auxiliary=auxiliary, method="auto", store=folder / "threads", max_requests=8
    ) as engine:
        for method in methods:
            engine.ensure(PASSAGES, method=method)
        asked = [
            engine.backbone.chat(
                [{"role": "user", "content": "\n\n".join([*rng.sample(PASSAGES, 2 + i % 3), f"Question {i}?"])}]
            )
            for i in range(prompts)
        ]
        jobs = [(prompt, method) for method in methods for prompt in asked]
        alone = {job: engine.generate(job[0], method=job[1], max_new_tokens=5).ids for job in jobs}
        again = {job: engine.generate(job[0], method=job[1], max_new_tokens=5).ids for job in jobs}
        counts.expect(alone == again, "one after another, answers differ from the first time")
        begin = threading.Barrier(count)

        def work(number: int) -> None:
            rng = random.Random(seed * 1000 + number)
            begin.wait(PATIENCE)
            for turn in range(requests):
                job, way = rng.choice(jobs), rng.choice(WAYS)
                other = passage(number * 1000 + turn)
                try:
                    match rng.randrange(4):
                        case 0:
                            engine.ensure([other])
                        case 1:
                            engine.ensure_later([other])
                        case 2:
                            engine.hint(PASSAGES, f"Question {turn}?", caller=number)  # of somebody else
                        case 3:
                            engine.forget([other])
                    ids, whole = ask(engine, job, way)
                except Exception as error:
                    counts.failed.append(f"{job[1]}, {way}: {type(error).__name__}: {error}")
                    continue
                expected = alone[job][: len(ids)] if not whole else alone[job]
                counts.expect(ids == expected, f"{job[1]}, {way}: another answer")
                counts.done["requests"] += 1
                counts.done[way] += 1

        running = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(PATIENCE)
            counts.expect(not thread.is_alive(), "a thread hangs")
        counts.done["threads"], counts.done["methods"] = count, len(methods)
        stats = engine.stats()
        counts.expect(not stats.in_flight and not stats.waiting, "places are held in the end")
        counts.expect(not stats.fallbacks, f"fallbacks: {stats.fallbacks}")
    return counts


def ask(engine: Engine, job: tuple[str, str], way: str) -> tuple[tuple[int, ...], bool]:
    """The answer's ids, and whether they are all there is of it."""
    prompt, method = job
    if way == "generate":
        return engine.generate(prompt, method=method, max_new_tokens=5).ids, True
    if way == "prefill":
        return (int(engine.prefill(prompt, method=method).logits.argmax()),), False
    with engine.stream(prompt, method=method, max_new_tokens=5) as stream:
        for _ in stream:
            if way == "stream and leave":
                break
        return tuple(stream.ids), way == "stream"
