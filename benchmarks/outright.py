"""When reuse is slower than full prefill, and whether `outright` says so: a Markdown table, in CPU time of one thread.

    OMP_NUM_THREADS=1 python benchmarks/outright.py --model smollm2-135m-instruct

A prompt is known chunks with unknown text between them; its length, the share of it that has stored KV and the number
of pieces vary. Every pair prefills one prompt in full and with reuse, one right after the other in alternating order,
reuse also where `outright` would prefill in full. CPU time, so that it can run beside other programs. No prompt finds a
preamble of an earlier one.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from speed import CORPUS

from cacheclip_rag import Engine
from cacheclip_rag.chunks import MIN_CHARS
from cacheclip_rag.prefill import compose
from cacheclip_rag.prompt import Layout, outright

QUESTION = "What do these passages propose, and for which reasons?"
LEAST = 32
"""Tokens of the shortest piece that is tried."""


class Pieces:
    """Pieces of the shipped PEPs, of any number of tokens, each one only once."""

    def __init__(self, engine: Engine) -> None:
        texts = [path.read_text(encoding="utf-8") for path in sorted(CORPUS.glob("*.txt"))]
        random.Random(0).shuffle(texts)
        self._text, self._at = "\n".join(texts), 0
        self._offsets = engine.backbone.tokenise(self._text).offsets

    def take(self, tokens: int, least: int = 0) -> str:
        """The next piece of so many tokens, and of at least so many characters."""
        while self._at + tokens < len(self._offsets):
            first, self._at = self._at, self._at + tokens
            text = self._text[int(self._offsets[first, 0]) : int(self._offsets[self._at, 0])].strip()
            if len(text) >= least:
                return text
        raise SystemExit("the corpus is used up: ask for fewer pairs")


def prompt_of(engine: Engine, pieces: Pieces, tokens: int, share: float, count: int) -> str:
    """A prompt of about so many tokens, this share of them in ``count`` chunks, which are stored."""
    own = tokens - 40  # what the template and the question take
    known = [pieces.take(int(own * share / count), MIN_CHARS) for _ in range(count)]
    unknown = [pieces.take(max(1, int(own * (1 - share) / count))) for _ in range(count)]
    engine.ensure(known)
    text = "\n\n".join(f"{new}\n\n{old}" for new, old in zip(unknown, known, strict=True))
    return engine.backbone.chat([{"role": "user", "content": f"{text}\n\n{QUESTION}"}])


class Decision:
    """Takes the place of `outright`: remembers what it says, and reuses anyway."""

    def __init__(self) -> None:
        self._inner = outright
        self.reuses, self.tokens, self.share, self.pieces = True, 0, 0.0, 0

    def __call__(self, layout: Layout, *given: Any) -> None:
        self.reuses = self._inner(layout, *given) is None
        self.tokens, self.pieces = len(layout), len(layout.runs())
        self.share = float(layout.reusable.float().mean())


def seconds(engine: Engine, prompt: str, method: str) -> float:
    for each in engine.collections:
        each.preambles.clear()
    start = time.process_time()
    engine.prefill(prompt, question=QUESTION, method=method, room=1)
    return time.process_time() - start


def cells(args: argparse.Namespace) -> Iterator[tuple[int, float, int]]:
    for tokens in args.tokens:
        for share in args.shares:
            for count in args.pieces:
                if tokens * share / count >= LEAST:
                    yield tokens, share, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--methods", nargs="+", default=["auto", "naive"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[200, 400, 800])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--pieces", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    decision = Decision()
    setattr(compose, "outright", decision)  # noqa: B010
    worst = {method: 0.0 for method in args.methods}
    with Engine(args.model) as engine:
        pieces = Pieces(engine)
        warm = prompt_of(engine, pieces, 200, 0.5, 2)
        for method in ("full", *args.methods):
            seconds(engine, warm, method)
        print("| method | tokens | with stored KV | pieces | full, CPU s | reuse / full | outright says |")
        print("|---|---|---|---|---|---|---|")
        for tokens, share, count in cells(args):
            full: dict[str, list[float]] = {method: [] for method in args.methods}
            ratios: dict[str, list[float]] = {method: [] for method in args.methods}
            reuses: dict[str, list[bool]] = {method: [] for method in args.methods}
            shapes: list[tuple[int, float, int]] = []
            for number in range(args.pairs):
                prompt = prompt_of(engine, pieces, tokens, share, count)
                for method in args.methods:
                    order = ("full", method) if number % 2 else (method, "full")
                    took = {each: seconds(engine, prompt, each) for each in order}
                    full[method].append(took["full"])
                    ratios[method].append(took[method] / took["full"])
                    reuses[method].append(decision.reuses)
                shapes.append((decision.tokens, decision.share, decision.pieces))
            length, held, parts = map(median, zip(*shapes, strict=True))
            for method in args.methods:
                ratio, says = median(ratios[method]), "reuse" if any(reuses[method]) else "full prefill"
                if says == "reuse":
                    worst[method] = max(worst[method], ratio)
                measured = f"{length:.0f} | {held:.0%} | {parts:.0f}"
                print(f"| {method} | {measured} | {median(full[method]):.2f} | {ratio:.2f} | {says} |", flush=True)
    for method, ratio in worst.items():
        print(f"\nWhere it says reuse, {method} took at most {ratio:.2f} of a full prefill.", flush=True)


if __name__ == "__main__":
    main()
