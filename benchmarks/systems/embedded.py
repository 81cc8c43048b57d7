"""This project's engine, in this process; each user is a thread that reads a stream."""

from __future__ import annotations

import threading
import time
from queue import Empty, SimpleQueue
from typing import Any

import torch
from asked import Asked

from cacheclip_rag import Engine
from cacheclip_rag.model.backbone import Backbone


def load(model: str, options: dict[str, Any], threads: int) -> Any:
    """``options``: those of `Engine`; under "backbone" those of `Backbone.load`, under "request" `Engine.stream`'s."""
    torch.set_num_threads(threads)
    options = dict(options)
    request, loading = options.pop("request", {}), options.pop("backbone", {})
    dtype = options.pop("dtype", "auto")
    return Engine(Backbone.load(model, dtype=dtype, **loading), **options), request


def ingest(system: Any, passages: list[str]) -> None:
    engine, _ = system
    stored = engine.ensure(passages)
    if stored.reasons:
        raise SystemExit(f"passages that could not be stored: {stored.reasons}")


def ask(system: Any, prompts: list[str], users: int, tokens: int) -> list[Asked]:
    engine, request = system
    waiting: SimpleQueue[int] = SimpleQueue()
    for number in range(len(prompts)):
        waiting.put(number)
    answers: dict[int, Asked] = {}
    errors: list[BaseException] = []

    def user() -> None:
        try:
            while True:
                number = waiting.get_nowait()
                start = time.perf_counter()
                stream = engine.stream(prompts[number], max_new_tokens=tokens, min_new_tokens=tokens, **request)
                text = next(stream)
                first = time.perf_counter() - start
                text += "".join(stream)
                total = time.perf_counter() - start
                answers[number] = {"first": first, "total": total, "tokens": len(stream.ids), "text": text}
        except Empty:
            return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=user) for _ in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [answers[number] for number in range(len(prompts))]
