"""How many of a passage's most similar passages are retrieved together with it.

    python benchmarks/companions.py DATA/xquad_fusion DATA/2wikimultihopqa --neighbours 2 5 10 15

For every passage of every question, among all passages of the file and of a `corpus.jsonl` beside it: the share of its
nearest neighbours (MiniLM embeddings) that are in the same prompt, and the share of the prompt's other passages that
are among its neighbours. Fusing with similar chunks can help only if the first share is high; the rest of the second
are passages in the prompt that the chunk was not fused with.
"""

from __future__ import annotations

import argparse

import numpy as np
from cacheclip_eval.embedding import mean_pooling
from cacheclip_eval.sources import sources

from cacheclip_rag.corpus.neighbours import Neighbourhood


def shares(prompts: list[list[str]], nearest: dict[str, list[str]], count: int) -> tuple[float, float]:
    """The share of ``count`` neighbours in the same prompt, and the share of the prompt's other passages among them."""
    together, covered = [], []
    for texts in prompts:
        for text in texts:
            others, neighbours = set(texts) - {text}, set(nearest[text][:count])
            if others and neighbours:
                together.append(len(others & neighbours) / len(neighbours))
                covered.append(len(others & neighbours) / len(others))
    return float(np.mean(together)), float(np.mean(covered))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="what `cacheclip eval` takes")
    parser.add_argument("--neighbours", nargs="+", type=int, default=[2, 5, 10, 15])
    arguments = parser.parse_args()
    embed = mean_pooling()
    print("| set | prompts | passages | neighbours | of them in the same prompt | of the prompt's others among them |")
    print("|---|---|---|---|---|---|")
    for source in sources(arguments.data):
        prompts = [list(dict.fromkeys(p.chunk.strip() for p in item.passages)) for item in source.all()]
        texts = list(dict.fromkeys([t for texts in prompts for t in texts] + [t.strip() for t in source.corpus()]))
        neighbourhood = Neighbourhood(max(arguments.neighbours))
        neighbourhood.add(texts, embed(texts))
        nearest = neighbourhood.nearest({t for texts in prompts for t in texts})
        for count in arguments.neighbours:
            together, covered = shares(prompts, nearest, count)
            print(
                f"| {source.name} | {len(prompts)} | {len(texts):,} | {count} | {together:.0%} | {covered:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
