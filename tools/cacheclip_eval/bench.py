"""The command ``cacheclip bench``: a short paired run on this machine, with speed and quality side by side.

``benchmarks/speed.py`` is the long version, with KV on disk and chunks of real documents.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from cacheclip_rag.engine import Engine
from cacheclip_rag.report import Report
from cacheclip_rag.verification import kl

from .ruler import sentences

NAIVE = "naive"

_WAYS = 3
"""Prefills of a prompt: in full, with reuse, and with plain reuse."""


@dataclass(frozen=True)
class Pair:
    """One prompt: seconds of a full prefill, the report of reuse, whether the first tokens are the ``same``, and the KL
    divergence of the first token's distribution in nats, for reuse (``kl``) and for plain reuse (``kl_naive``).
    """

    full: float
    reuse: Report
    same: bool
    kl: float
    kl_naive: float


@dataclass(frozen=True)
class Result:
    """The summary of all pairs: medians of seconds and of their ratios, means of divergences.

    ``times_faster``: full prefill's time to first token over reuse's; ``times_sooner`` is its former name.
    """

    method: str
    ratio: float
    pairs: int
    prompt_tokens: int
    full_prefill_s: float
    reuse_s: float
    times_sooner: float
    times_faster: float
    bound: float
    same_first_token: int
    kl: float
    kl_naive: float
    encode_s: float


def passages(engine: Engine, chunks: int, tokens: int, seed: int) -> list[str]:
    """``chunks`` passages of generated prose of about ``tokens`` tokens each, different for every seed."""
    words = sentences(random.Random(seed))
    texts = []
    for _ in range(chunks):
        sample = " ".join(islice(words, 12))
        needed = 12 * tokens / len(engine.backbone.tokenise(sample))
        texts.append(" ".join([sample, *islice(words, max(0, round(needed) - 12))]))
    return texts


def run(
    engine: Engine,
    *,
    chunks: int = 8,
    tokens: int = 200,
    pairs: int = 3,
    method: str | None = None,
    ratio: float | None = None,
    progress: Callable[[str, int, int], Any] = lambda *_: None,
) -> Result:
    """Measure ``pairs`` prompts of ``chunks`` passages of ``tokens`` tokens each, after one prompt to warm up.

    Each prompt is prefilled by transformers' own attention and by the engine, in alternating order, with the same
    weights in memory; chunk KV is in memory as well. Raises what `Engine.generate` raises.
    """
    done, encoding = [], 0.0
    steps = range((chunks + _WAYS) * (pairs + 1))
    step = iter(steps)
    for number in range(pairs + 1):
        about = f"prompt {number} of {pairs}" if number else "warming up"
        show = partial(_show, progress, step, len(steps), about)
        texts = passages(engine, chunks, tokens, seed=number)
        start = time.perf_counter()
        engine.ensure(texts, partial(show, "reading its chunks"))
        encoding = time.perf_counter() - start
        done.append(_pair(engine, _prompt(engine, texts), method, ratio, bool(number % 2), show))
    return _summary(done[1:], encoding)


def _show(
    progress: Callable[[str, int, int], Any], step: Iterator[int], steps: int, about: str, what: str, *_: int
) -> None:
    progress(f"{about}: {what}", next(step, steps), steps)


def _prompt(engine: Engine, texts: Sequence[str]) -> str:
    content = "\n\n".join(["Context:", *texts, "Question: What did the carpenter carry, and where?"])
    return engine.backbone.chat([{"role": "user", "content": content}])


def _pair(
    engine: Engine,
    prompt: str,
    method: str | None,
    ratio: float | None,
    reuse_first: bool,
    show: Callable[[str], Any],
) -> Pair:
    results: dict[str, Any] = {}
    for way in ("reuse", "full prefill") if reuse_first else ("full prefill", "reuse"):
        show(way)
        if way == "reuse":
            results[way] = engine.prefill(prompt, method=method, recompute_ratio=ratio)
        else:
            results[way] = _full(engine, prompt)
    show("plain reuse")
    seconds, wanted = results["full prefill"]
    ours, plain = results["reuse"], engine.prefill(prompt, method=NAIVE)
    same = int(ours.logits.argmax()) == int(wanted.argmax())
    return Pair(seconds, ours.report, same, kl(wanted, ours.logits), kl(wanted, plain.logits))


def _full(engine: Engine, prompt: str) -> tuple[float, Tensor]:
    """Seconds of transformers' own full prefill, tokenisation included, and its logits ``[1, V]``."""
    backbone = engine.backbone
    backbone.model.set_attn_implementation("sdpa")
    try:
        start = time.perf_counter()
        logits, _ = backbone.native_prefill(backbone.tokenise_prompt(prompt).ids)
        int(logits.argmax())
        return time.perf_counter() - start, logits
    finally:
        backbone.model.set_attn_implementation(backbone.attention)


def _summary(pairs: Sequence[Pair], encoding: float) -> Result:
    first, times = pairs[0].reuse, median(pair.full / pair.reuse.ttft for pair in pairs)
    return Result(
        method=first.method,
        ratio=first.requested_ratio,
        pairs=len(pairs),
        prompt_tokens=int(median(pair.reuse.prompt_tokens for pair in pairs)),
        full_prefill_s=median(pair.full for pair in pairs),
        reuse_s=median(pair.reuse.ttft for pair in pairs),
        times_sooner=times,
        times_faster=times,
        bound=median(pair.reuse.bound for pair in pairs),
        same_first_token=sum(pair.same for pair in pairs),
        kl=mean(pair.kl for pair in pairs),
        kl_naive=mean(pair.kl_naive for pair in pairs),
        encode_s=encoding,
    )


def machine() -> str:
    """The machine and torch version, in one line."""
    import platform

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def lines(result: Result) -> Iterator[str]:
    """The result as lines to print."""
    yield f"{result.pairs} prompts of {result.prompt_tokens:,} tokens, {result.method}, r = {result.ratio:g}"
    yield machine()
    yield f"full prefill           {result.full_prefill_s:8.2f} s to the first token"
    yield (
        f"reuse                  {result.reuse_s:8.2f} s, {result.times_faster:.1f} times faster "
        f"(upper bound by computed tokens: {result.bound:.1f})"
    )
    yield f"first token the same   {result.same_first_token:8d} of {result.pairs}"
    yield f"KL to full prefill     {result.kl:8.3f} nats, plain reuse {result.kl_naive:.3f}"
    yield f"reading the chunks once{result.encode_s:8.2f} s, at ingestion"
