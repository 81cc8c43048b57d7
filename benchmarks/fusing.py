"""The cost of fusing a chunk, relative to encoding it.

    python benchmarks/fusing.py DATA/xquad_fusion --neighbours 2 5 10 15

Each passage of the questions is encoded in isolation and then fused behind its most similar passages (MiniLM embeddings
of all passages of the file and of a `corpus.jsonl` beside it): medians of paired runs. A fused variant takes as many
bytes as the isolated chunk, and is stored besides it. Finally, short chunks cut from these passages are fused one by
one and in one batch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from cacheclip_eval.embedding import mean_pooling
from cacheclip_eval.sources import sources

from cacheclip_rag import Engine
from cacheclip_rag.corpus.neighbours import similar

SHORT = 200
"""Characters of a short chunk."""


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def costs(engine: Engine, nearest: Mapping[str, Sequence[str]], count: int) -> tuple[float, float]:
    """Seconds to fuse a chunk with ``count`` neighbours, and their ratio to the seconds of encoding it."""
    fusing, times = [], []
    for text, context in nearest.items():
        engine.ensure([text, *context[:count]])
        alone = seconds(lambda text=text: engine.library.encode(text))
        fusing.append(seconds(lambda text=text, context=context: engine.fuse({text: context[:count]})))
        times.append(fusing[-1] / alone)
    return median(fusing[1:]), median(times[1:])  # the first one warms up


def batch_speedup(engine: Engine, texts: Sequence[str], count: int, pairs: int = 5) -> float:
    """How many times faster short chunks are fused in one batch than one by one: the median of paired runs."""
    engine.ensure(texts)
    ratios = []
    for pair in range(pairs + 1):
        mine = texts[pair * 10 : pair * 10 + 10]
        first = {text: [other for other in mine if other != text][:count] for text in mine}
        second = {text: context[::-1] for text, context in first.items()}
        slow = seconds(lambda first=first: [engine.fuse({text: context}) for text, context in first.items()])
        ratios.append(slow / seconds(lambda second=second: engine.fuse(second)))
    return median(ratios[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="what `cacheclip eval` takes")
    parser.add_argument("--model", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--neighbours", nargs="+", type=int, default=[2, 5, 10, 15])
    arguments = parser.parse_args()
    [source] = sources([arguments.data])
    texts = list(dict.fromkeys(p.chunk.strip() for item in source.all() for p in item.passages))
    every = list(dict.fromkeys([*texts, *(text.strip() for text in source.corpus())]))
    start = time.perf_counter()
    nearest = similar(every, mean_pooling(), max(arguments.neighbours))
    print(f"{(time.perf_counter() - start) / len(every) * 1000:.0f} ms a passage to embed and to compare\n")
    engine = Engine(arguments.model, method="naive:fused=True")
    chosen = {text: nearest[text] for text in texts[:: max(1, len(texts) // (arguments.chunks + 1))]}
    sizes = [len(engine.library.ensure(text)) for text in chosen]
    print(f"{len(chosen)} passages of {median(sizes):.0f} tokens in the median\n")
    print("| neighbours | ms to fuse a passage | times encoding it |\n|---|---|---|")
    for count in arguments.neighbours:
        fusing, times = costs(engine, chosen, count)
        print(f"| {count} | {fusing * 1000:.0f} | {times:.2f} |", flush=True)
    short = [text[at : at + SHORT] for text in texts for at in range(0, len(text) - SHORT, SHORT)]
    print(
        f"\n{batch_speedup(engine, short, 5):.2f} times faster in one batch: ten chunks of {SHORT} characters, "
        "five neighbours each"
    )


if __name__ == "__main__":
    main()
