"""Analyses of selection for any model and data: agreement of attention, and deviation of reused KV by layer and place.

`agreement`: does the auxiliary model attend to the same tokens as the primary? `deviation`: how wrong is reused KV, and
where, and does one layer's error predict another's? Rows are JSON-ready; `plots` draws them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cacheclip_rag.compute import LayerInput
from cacheclip_rag.engine import Engine
from cacheclip_rag.methods.auxiliary import Auxiliary
from cacheclip_rag.methods.scores import AttentionScores
from cacheclip_rag.methods.select.budget import top
from cacheclip_rag.model.rotary import PerTokenRotation
from cacheclip_rag.prefill.result import Prefill

from .data import Item, prompt

log = logging.getLogger("cacheclip_rag")

EPSILON = 1e-8  # keeps the KL finite for tokens without any attention


class _ByLayer:
    """A hook with separate scores for each layer."""

    def __init__(self, rows: Tensor, columns: Tensor, layers: Sequence[int]) -> None:
        self.layers = frozenset(layers)
        self._each = {layer: AttentionScores(rows, columns, [layer]) for layer in layers}

    def __call__(self, at: LayerInput) -> None:
        self._each[at.layer](at)

    def scores(self) -> dict[int, Tensor]:
        return {layer: each.scores.cpu() for layer, each in self._each.items()}


def agreement(
    engine: Engine, items: Sequence[Item], auxiliaries: Mapping[str, Auxiliary], ratio: float = 0.2
) -> Iterator[dict[str, Any]]:
    """How well the top tokens of each layer of each model agree with those of the primary model's last layer.

    The reference is the primary's last-layer attention from the question to the context in a full prefill. For every
    layer of every auxiliary model, on its own reused KV, and of the primary itself, a row holds ``jaccard`` of the two
    top ``ratio`` sets and ``kl`` (reference || layer, nats) of the two distributions over context tokens.
    ``depth`` is the layer / the model's layers. Source: CacheClip (arXiv 2510.10129), its comparison of auxiliary and
    primary attention with the primary's own first layer.
    """
    for item in items:
        texts = [passage.chunk for passage in item.passages]
        engine.ensure(texts)
        text = prompt(item, engine.backbone)
        stale = engine.prefill(text, question=item.question, method="naive")
        full = engine.prefill(text, question=item.question, method="full")
        context = stale.layout.reusable.nonzero()[:, 0]
        if not len(context) or not item.question.strip():
            log.warning("%s is left out: it has no passages that are chunks, or no question", item.id)
            continue
        own = _attention(engine, full, item.question, context)
        reference = own[max(own)]
        for layer, scores in own.items():
            yield _agreement(item, "primary", layer, len(own), reference, scores, ratio)
        for name, auxiliary in auxiliaries.items():
            for layer in auxiliary.backbone.full_layers:
                results = auxiliary.score(texts, item.question, layer)
                scores = _mapped(stale, texts, results)[context]
                yield _agreement(item, name, layer, auxiliary.backbone.layers, reference, scores, ratio)


def _agreement(
    item: Item, model: str, layer: int, layers: int, reference: Tensor, scores: Tensor, ratio: float
) -> dict[str, Any]:
    budget = max(1, int(ratio * len(reference)))
    a, b = set(top(reference, budget).tolist()), set(top(scores, budget).tolist())
    p, q = ((s.double() + EPSILON) / (s.double() + EPSILON).sum() for s in (reference, scores))
    return {
        "id": item.id,
        "model": model,
        "layer": layer,
        "depth": layer / max(1, layers - 1),
        "jaccard": len(a & b) / len(a | b),
        "kl": float((p * (p / q).log()).sum()),
    }


def _attention(engine: Engine, full: Prefill, question: str, context: Tensor) -> dict[int, Tensor]:
    """``[C]`` for every full-attention layer: the question's attention to the ``context [C]`` rows."""
    backbone, layout = engine.backbone, full.layout
    assert full.canvas is not None
    at = layout.prompt.rfind(question)
    rows = ((layout.offsets[:, 0] < at + len(question)) & (layout.offsets[:, 1] > at)).nonzero()[:, 0]
    hook = _ByLayer(rows.to(backbone.device), context.to(backbone.device), backbone.full_layers)
    # Computing the last rows again does not change the canvas, and lets the hook see their attention.
    again = torch.arange(int(rows[0]), len(layout))
    backbone.forward(layout.ids[again], again, full.canvas, logits=0, hooks=[hook])
    return hook.scores()


def _mapped(prefill: Prefill, texts: Sequence[str], results: Sequence[Any]) -> Tensor:
    """``[T]``: the auxiliary model's scores, mapped to the primary's tokens."""
    layout, by_text = prefill.layout, dict(zip(texts, results, strict=True))
    scores = torch.zeros(len(layout))
    for number, span in enumerate(layout.spans):
        mine = (layout.chunk == number).nonzero()[:, 0]
        stretch = layout.prompt[span.start : span.end]
        found = next((r for text, r in by_text.items() if stretch in text), None)
        if found is not None and len(mine):
            offsets = layout.offsets[mine] - (span.start - span.offset)
            scores[mine] = torch.from_numpy(found.over(offsets.numpy()))
    return scores


def deviation(
    engine: Engine, items: Sequence[Item], method: str = "naive", ratio: float = 0.15, bins: int = 20
) -> Iterator[dict[str, Any]]:
    """How far reused keys are from a full prefill's: ``mean_h ||K_full - K_reused||_2``, by layer and place.

    One row per item and layer: ``mean``; ``by_place``, means over ``bins`` equal parts of the chunks, first to last;
    ``overlap``: for each selecting layer, the share of this layer's top ``ratio`` tokens that it finds; and
    ``shared_keys``, ``shared_values``: the share of the squared deviation that is common to all tokens of a chunk, keys
    rotated to one position (None at layer 0, which has no deviation), which is what `recompute.Carry` can remove.
    ``method`` says how the chunks were encoded (one that recomputes nothing: naive, promptcache, link0).
    Source: the study (arXiv 2603.20218), figures 3 and 5.
    """
    for item in items:
        engine.ensure([passage.chunk for passage in item.passages], method=method)
        text = prompt(item, engine.backbone)
        stale = engine.prefill(text, question=item.question, method=method)
        full = engine.prefill(text, question=item.question, method="full")
        assert stale.canvas is not None and full.canvas is not None
        rows = stale.layout.reusable.nonzero()[:, 0]
        if not len(rows):
            log.warning("%s is left out: it has no passages that are chunks", item.id)
            continue
        # [C, Hk, D] -> [C], a layer at a time
        distances = torch.stack(
            [_change(full, stale, layer, rows)[0].norm(dim=-1).mean(dim=1) for layer in range(engine.backbone.layers)]
        )
        place = _place(stale.layout.chunk[rows], bins)
        budget = max(1, int(ratio * len(rows)))
        best = [set(top(d, budget).tolist()) for d in distances]
        back, groups = PerTokenRotation(engine.backbone.rotary, -rows), stale.layout.chunk[rows]
        for layer, d in enumerate(distances):
            keys, values = _change(full, stale, layer, rows)
            yield {
                "id": item.id,
                "method": method,
                "layer": layer,
                "depth": layer / max(1, engine.backbone.layers - 1),
                "mean": float(d.mean()),
                "by_place": [float(d[place == b].mean()) if bool((place == b).any()) else None for b in range(bins)],
                "overlap": [len(best[layer] & other) / budget for other in best],
                "shared_keys": shared_part(back(keys, layer), groups) if layer else None,
                "shared_values": shared_part(values, groups) if layer else None,
            }


def _change(full: Prefill, stale: Prefill, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[C, Hk, D]`` float32 of a full prefill minus the reused ones, at ``rows [C]`` of one layer."""
    assert full.canvas is not None and stale.canvas is not None
    pairs = zip(full.canvas.placed(layer), stale.canvas.placed(layer), strict=True)
    keys, values = ((whole[rows].float() - reused[rows].float()).cpu() for whole, reused in pairs)
    return keys, values


def shared_part(change: Tensor, groups: Tensor) -> float:
    """The share of the sum of squares of ``change [C, Hk, D]`` that the means of ``groups [C]`` int64 explain."""
    number = groups.unique(return_inverse=True)[1]
    sums = change.new_zeros(int(number.max()) + 1, *change.shape[1:]).index_add_(0, number, change)
    means = sums / torch.bincount(number)[:, None, None]
    return float(means[number].square().sum() / change.square().sum().clamp_min(1e-12))


def _place(chunk: Tensor, bins: int) -> Tensor:
    """``[C]``: which of ``bins`` equal parts of its chunk a token is in."""
    place = torch.zeros(len(chunk), dtype=torch.long)
    for number in chunk.unique():
        mine = (chunk == number).nonzero()[:, 0]
        place[mine] = torch.arange(len(mine)) * bins // len(mine)
    return place
