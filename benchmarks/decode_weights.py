"""What smaller weights give a decoding step on this CPU, and what they cost: PyTorch's kernels, then a whole model.

    OMP_NUM_THREADS=1 python benchmarks/decode_weights.py DATA --model qwen2.5-coder-0.5b-instruct

First the linear layers of the model's shapes, by the number of rows of a pass: milliseconds of CPU time, the least of
several runs over several copies of each weight, so that weights come from memory and not from a cache. Then decoding
with ``decode_weights="int4"`` against the model's own weights: CPU time of a step, KL of its logits
(teacher-forced on the model's own answers, a row a pass), and F1 over questions of ``DATA``, a folder with
``qa.jsonl``. CPU time, since it says something on a busy machine as well.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from cacheclip_eval.bench import machine
from cacheclip_eval.data import Item, prompt, read, shortened, spread
from cacheclip_eval.metrics import f1
from torch import Tensor, nn

from cacheclip_rag import Engine
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.model.decode_weights import GROUP, fits, quantise
from cacheclip_rag.verification import kl
from cacheclip_rag.weights.pull import resolve

ROWS = (1, 2, 4, 6, 8, 16)
COPIES = 150e6
"""Bytes of bfloat16 that the copies of a weight take together."""

Call = Callable[[Tensor], Tensor]


def kernels(weight: Tensor) -> dict[str, Call]:
    """A product with this weight ``[out, in]`` bfloat16, by PyTorch's kernels."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    scale = weight.float().abs().amax(1) / 127
    eight = (weight.float() / scale[:, None]).round().to(torch.int8)
    calls: dict[str, Call] = {
        "bfloat16": lambda x: nn.functional.linear(x, weight),
        "bfloat16, packed": lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
        "8 bits": lambda x: torch._weight_int8pack_mm(x, eight, scale.bfloat16()),
    }
    if fits(*weight.shape):
        four, scales = quantise(weight)
        calls["4 bits"] = lambda x: torch._weight_int4pack_mm_for_cpu(x, four, GROUP, scales)
    return calls


def least(calls: Sequence[Call], x: Tensor, seconds: float = 0.2) -> float:
    """CPU seconds of one call, the least of several rounds over all of them."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.process_time()
        for call in calls:
            call(x)
        taken.append((time.process_time() - start) / len(calls))
    return min(taken)


@torch.inference_mode()
def layers(backbone: Backbone) -> Iterator[str]:
    """All linear layers of a pass together."""
    shapes = Counter(
        (module.out_features, module.in_features)
        for module in backbone.model.modules()
        if isinstance(getattr(module, "in_features", None), int)
    )
    total: dict[str, Counter[int]] = {}
    for (out, width), count in shapes.items():
        copies = max(1, min(24, int(COPIES / (2 * out * width))))
        made = [kernels(torch.randn(out, width).mul_(0.02).bfloat16()) for _ in range(copies)]
        for name in made[0]:
            for rows in ROWS:
                x = torch.randn(rows, width).bfloat16()
                total.setdefault(name, Counter())[rows] += count * least([each[name] for each in made], x)  # type: ignore[assignment]
    yield f"| rows of a pass | {' | '.join(map(str, ROWS))} |"
    yield "|---" * (len(ROWS) + 1) + "|"
    for name, by_rows in total.items():
        yield f"| {name} | {' | '.join(f'{1000 * by_rows[rows]:.0f} ms' for rows in ROWS)} |"


def answers(engine: Engine, items: Sequence[Item], tokens: int) -> list[Any]:
    return [engine.generate(prompt(item, engine.backbone), method="full", max_new_tokens=tokens) for item in items]


def logits(engine: Engine, item: Item, ids: Sequence[int]) -> tuple[Tensor, list[float]]:
    """The logits ``[n, V]`` behind each token of an answer, a row a pass, and the CPU seconds of each."""
    ready = engine.prefill(prompt(item, engine.backbone), method="full", room=len(ids) + 1)
    found, seconds = [], []
    for number, token in enumerate(ids):
        start = time.process_time()
        found.append(ready.step(torch.tensor([token]), len(ready.layout) + number))
        seconds.append(time.process_time() - start)
    return torch.cat(found), seconds


def compare(path: Path, items: Sequence[Item], tokens: int) -> Iterator[str]:
    own = Engine(Backbone.load(path, dtype="bfloat16"), prompt_lookup=0)
    said = answers(own, items, tokens)
    expected = [logits(own, item, answer.ids) for item, answer in zip(items, said, strict=True)]
    start = time.process_time()
    four = Engine(path, dtype="bfloat16", decode_weights="int4", prompt_lookup=0)
    loading = time.process_time() - start
    ours = [logits(four, item, answer.ids) for item, answer in zip(items, said, strict=True)]
    again = answers(four, items, tokens)
    pairs = [(one, other) for (one, _), (other, _) in zip(expected, ours, strict=True)]
    each = [kl(a[None], b[None]) for one, other in pairs for a, b in zip(one, other, strict=True)]
    same = mean(float(a.argmax() == b.argmax()) for one, other in pairs for a, b in zip(one, other, strict=True))
    equal = sum(one.ids == other.ids for one, other in zip(said, again, strict=True))
    assert four.backbone.decode_weights is not None
    size = four.backbone.decode_weights.nbytes / (1 << 20)
    yield f"{len(items)} questions, {len(each)} tokens; 4 bits: {size:.0f} MiB more, {loading:.0f} CPU s to load\n"
    yield "| | CPU time of a step | F1 |"
    yield "|---|---|---|"
    for name, steps, texts in (("the model's own weights", expected, said), ("4 bits", ours, again)):
        taken = median(seconds for _, one in steps for seconds in one)
        score = mean(f1(answer.text, item.answers) for answer, item in zip(texts, items, strict=True))
        yield f"| {name} | {1000 * taken:.0f} ms | {score:.3f} |"
    yield f"\nKL {mean(each):.3f} nats (median {median(each):.4f}), the same first choice at {same:.1%} of the tokens,"
    yield f"the same answer to {equal} of {len(items)} questions"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--passages", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--no-layers", action="store_true")
    args = parser.parse_args()
    items = [shortened(item, args.passages) for item in spread(read(args.data / "qa.jsonl"), args.questions)]
    path = resolve(args.model)
    print(f"{args.model}, {machine()}\n")
    if not args.no_layers:
        print(*layers(Backbone.load(path, dtype="bfloat16", packed=False)), sep="\n", flush=True)
        print()
    print(*compare(path, items, args.tokens), sep="\n")


if __name__ == "__main__":
    main()
