"""Cache-Craft's chunk caches: KV variants taken from finished prompts, and the scores that choose among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...chunks import ChunkKV
from ...compute import LayerInput, visible
from ...deprecation import dropped_parameters
from ...errors import PromptError
from ...spec import at_least
from ...store import LRUCache, MemoryBudget
from .base import Front, Text
from .isolated import Isolated

if TYPE_CHECKING:
    from ...model.backbone import Backbone


@dropped_parameters(chunks="harvested variants share the engine's memory_bytes")
@dataclass(frozen=True)
class Harvested(Isolated):
    """Cache-Craft: no KV at ingestion; every full prefill leaves a variant of each chunk, contextualised by the chunks
    before it.

    ``variants``: how many are kept per chunk (the least used are evicted). ``alpha`` scales the fix-up overhead, which
    decides how much to recompute. Only full prefills are harvested: a variant from a repaired prompt would carry its
    remaining error into later prompts. Variants are kept in memory, as many as fit; the least recently used chunk's are
    evicted, where the paper keeps a number of chunks. Source: Cache-Craft (arXiv 2502.15734), sections 3 and 4.
    """

    prefix: str | None = None
    variants: int = 5
    alpha: float = 1.0

    strategy: ClassVar[str] = "harvest"

    def __post_init__(self) -> None:
        at_least(1, variants=self.variants)
        at_least(0.0, alpha=self.alpha)

    def encode(self, backbone: Backbone, texts: Sequence[Text], fronts: Sequence[Front]) -> list[ChunkKV]:
        raise PromptError("cachecraft encodes no chunk ahead: its KV is harvested from the first prompt with it")


@dataclass(eq=False)
class HarvestedVariant:
    """One chunk's KV from a finished prompt; ``before``: the names of the chunks that preceded it, in order.

    ``inter[j]``: the attention mass from its tokens to chunk j, mean over layers and heads; ``cci``: its
    `contextualisation`; ``kv.extra["inter_attention"] [n]``: the mass from each token to all preceding chunks.
    """

    kv: ChunkKV
    before: tuple[str, ...]
    inter: dict[str, float]
    cci: float
    uses: int = 0


class HarvestedVariants:
    """The variants of chunks by the chunks' names in the index, within a `MemoryBudget`: they may be gone at the next
    look.
    """

    def __init__(self, recipe: Harvested, memory: MemoryBudget) -> None:
        self._recipe = recipe
        self._kept: LRUCache[str, tuple[HarvestedVariant, ...]] = LRUCache(memory, "harvested variants")

    def __contains__(self, name: object) -> bool:
        return name in self._kept

    def of(self, name: str) -> list[HarvestedVariant]:
        return list(self._kept.get(name) or ())

    def best(self, name: str, before: Sequence[str]) -> tuple[HarvestedVariant, float] | None:
        """The variant with the lowest fix-up overhead behind the chunks ``before``, and that overhead; None if the
        chunk has no variant.

        Of equal ones, the variant computed behind most of these chunks wins: a variant without any chunk before it
        always scores 0.
        """
        alpha = self._recipe.alpha
        scored = [(fix_overhead(v.cci, v.inter, v.before, before, alpha), v) for v in self.of(name)]
        if not scored:
            return None
        overhead, chosen = min(scored, key=lambda pair: (pair[0], -len(set(before) & set(pair[1].before))))
        chosen.uses += 1
        return chosen, overhead

    def add(self, name: str, variant: HarvestedVariant) -> None:
        known = self.of(name)
        if any(v.before == variant.before for v in known):
            return
        if len(known) >= self._recipe.variants:
            known.remove(min(known, key=lambda v: v.uses))
        self._keep(name, [*known, variant])

    def forget(self, name: str) -> None:
        """Drop a chunk's variants, and all variants of other chunks that were computed behind it."""
        self._kept.pop(name)
        for other, variants in self._kept.items():
            if left := [v for v in variants if name not in v.before]:
                self._keep(other, left)
            else:
                self._kept.pop(other)

    def _keep(self, name: str, variants: Sequence[HarvestedVariant]) -> None:
        self._kept.put(name, tuple(variants), sum(variant.kv.nbytes for variant in variants))


def contextualisation(inter: float, intra: float) -> float:
    """``CCI = 1 / (1 + exp(-a / b))``: a chunk's attention to others (``a``) relative to itself (``b``), 0.5..1.

    ``a = sum_j inter(C_i, C_j) / (|C_i| |C_j|)`` and ``b = intra(C_i) / |C_i|^2``, means over layers and heads.
    """
    return 1.0 / (1.0 + math.exp(-min(50.0, inter / intra))) if intra > 0 else 1.0


def fix_overhead(
    cci: float, inter: dict[str, float], old: Sequence[str], new: Sequence[str], alpha: float = 1.0
) -> float:
    """``CFO = clip(alpha CCI (1 - beta'), 0, 1)``: the share of a variant's tokens to recompute behind ``new`` chunks.

    ``beta' = beta (1 - gamma)``: ``beta`` is the share of the attention to ``old`` chunks that went to chunks which
    precede it again (1 if there were none), ``gamma`` the share of those chunks' pairs in reverse order.
    """
    common = [name for name in dict.fromkeys(new) if name in inter]
    total = sum(inter.values())
    overlap = sum(inter[name] for name in common) / total if total > 0 else 1.0
    return min(1.0, max(0.0, alpha * cci * (1.0 - overlap * (1.0 - disorder(old, common)))))


def disorder(old: Sequence[str], new: Sequence[str]) -> float:
    """``gamma``: the share of the pairs of common names that are in reverse order; 0 without pairs."""
    places = [list(old).index(name) for name in dict.fromkeys(new) if name in old]
    pairs = [(a, b) for i, a in enumerate(places) for b in places[i + 1 :]]
    return sum(a > b for a, b in pairs) / len(pairs) if pairs else 0.0


@dataclass(eq=False)
class ChunkMass:
    """A hook that sums the attention from every row of a full prefill to each chunk: ``mass [T, chunks]`` float32.

    It is the mean over heads and ``layers``. ``groups [T]`` int64: the chunk of every slot, -1 for none. Rows are
    processed in blocks, so that no whole attention matrix exists. ``window``: the layers' sliding window in tokens.
    """

    groups: Tensor
    layers: frozenset[int]
    window: int | None = None
    mass: Tensor = field(init=False)
    block: int = 128

    def __post_init__(self) -> None:
        size = len(self.groups), int(self.groups.max()) + 1
        self.mass = torch.zeros(size, dtype=torch.float32, device=self.groups.device)
        self._one_hot = torch.nn.functional.one_hot(self.groups + 1)[:, 1:].float()

    def __call__(self, at: LayerInput) -> None:
        keys = at.key.float().transpose(0, 1).unsqueeze(1)  # [Hk, 1, T, D]
        for rows, query in zip(at.rows.split(self.block), at.query.float().split(self.block), strict=True):
            logits = query.transpose(0, 1).unflatten(0, (len(keys), -1)) @ keys.mT * at.scaling  # [Hk, G, R, T]
            hidden = ~visible(rows, keys.shape[2], self.window)
            paid = logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1).mean(dim=(0, 1))
            self.mass[rows] += paid @ self._one_hot[: keys.shape[2]] / len(self.layers)


def harvest(
    kv: ChunkKV, number: int, before: Sequence[tuple[str, int]], mass: Tensor, lengths: Tensor
) -> HarvestedVariant:
    """The variant of chunk ``number``: its ``kv``, and the statistics of its attention to other chunks.

    ``mass [n, chunks]``: the attention of its tokens to each chunk; ``before``: names and numbers of the preceding
    chunks, in order; ``lengths [chunks]``: tokens of each chunk.
    """
    inter: dict[str, float] = {}
    for other, j in before:
        inter[other] = inter.get(other, 0.0) + float(mass[:, j].sum())
    n = len(kv)
    a = sum(float(mass[:, j].sum()) / (n * float(lengths[j])) for _, j in before)
    b = float(mass[:, number].sum()) / n**2
    inter_attention = mass[:, [j for _, j in before]].sum(dim=1)
    kv = replace(kv, extra={**kv.extra, "inter_attention": inter_attention.cpu()})
    return HarvestedVariant(kv, tuple(dict.fromkeys(other for other, _ in before)), inter, contextualisation(a, b))
