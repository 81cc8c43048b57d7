"""The contexts that chunks of some questions can be fused in, or the reasons why they cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, median

import numpy as np

from cacheclip_rag.corpus.neighbours import Embed
from cacheclip_rag.errors import WeightsError

from .contexts import FusionPlan, Planner, planner
from .data import Item
from .embedding import mean_pooling
from .sources import Source

NEAR = 0.3
"""The cosine similarity (MiniLM) from which a chunk's nearest neighbour counts as similar, in the median."""

Planners = Mapping[str, Planner]
"""By data set."""


def by_similarity(found: Sequence[Source], asked: Mapping[str, Sequence[Item]], count: int) -> Planners | str:
    """Each chunk behind the ``count`` most similar ones of its data set's passages and ``corpus.jsonl``; a reason where
    there are no others, or none that is similar.
    """
    try:
        embed = mean_pooling()
    except WeightsError as error:
        return f"passages cannot be embedded ({error})"
    planners = {source.name: planner("similar", count, source.all(), source.corpus(), embed) for source in found}
    pairs = [pair for name, items in asked.items() for pair in _nearest(planners[name], items)]
    if not pairs:
        return "there is no other passage to be similar to"
    similarity = median(_cosines(embed, pairs))
    if similarity < NEAR:
        return f"no neighbour is similar: the nearest one's cosine is {similarity:.2f} in the median, below {NEAR}"
    return planners


def by_use(found: Sequence[Source], asked: Mapping[str, Sequence[Item]], count: int) -> Planners | str:
    """Each chunk behind the ``count`` ones that other questions of its data set retrieved with it most often; one that
    no other question retrieved stays by itself. A reason where that is so for all.
    """
    planners, again = dict[str, Planner](), list[bool]()
    for source in found:
        corpus = source.all()
        used = Counter(text for item in corpus for text in {passage.chunk for passage in item.passages})
        planners[source.name] = _retrieved_again(planner("use", count, corpus, (), _none), used)
        again += [used[passage.chunk] > 1 for item in asked[source.name] for passage in item.passages]
    return planners if mean(again) else "no passage was retrieved for two questions"


def _retrieved_again(plan: Planner, used: Mapping[str, int]) -> Planner:
    return lambda item: FusionPlan({text: c for text, c in plan(item).neighbours.items() if used[text] > 1})


def _nearest(plan: Planner, items: Sequence[Item]) -> Iterator[tuple[str, str]]:
    for item in items:
        for text, context in plan(item).neighbours.items():
            if context:
                yield text, context[0]


def _cosines(embed: Embed, pairs: Sequence[tuple[str, str]]) -> list[float]:
    one, other = (np.asarray(embed([pair[side] for pair in pairs]), dtype=np.float64) for side in (0, 1))
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return list((one * other).sum(axis=1) / np.maximum(lengths, 1e-12))


def _none(texts: list[str]) -> list[list[float]]:
    raise AssertionError("what was used together needs no embedding")
