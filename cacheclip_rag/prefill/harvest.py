"""Cache-Craft's reuse: chunk KV taken from earlier prompts and repaired for this one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..chunks import ChunkKV
from ..kv.collections import Collections
from ..kv.encode import HarvestedVariants
from ..kv.encode.harvested import ChunkMass, harvest
from ..model.canvas import Canvas
from ..report import Report
from .compose import Composer
from .reading import Reading, workspace_size
from .result import Prefill, PrefillRequest
from .sources import sources_of
from .stages import Loaded


class Harvest:
    """The strategy ``harvest``: reuse harvested variants if every chunk has one; else full prefill and harvest.

    Source: Cache-Craft (arXiv 2502.15734).
    """

    def __init__(self, collections: Collections, composer: Composer) -> None:
        self._collections, self._composer = collections, composer

    def __call__(self, request: PrefillRequest, reading: Reading, report: Report) -> Prefill:
        collection = self._collections.of(request.method.encode)
        variants = collection.harvested
        assert variants is not None
        if reading.spans and all(span.key in variants for span in reading.spans):
            return self._composer(request, reading, collection, lambda reading: _load(reading, variants), report)
        return self._cold(request, reading, variants, report)

    def _cold(self, request: PrefillRequest, reading: Reading, variants: HarvestedVariants, report: Report) -> Prefill:
        """Full prefill; stores a variant of every chunk that is complete in the prompt."""
        backbone = self._collections.backbone_of(request.method.encode)
        layout, groups = reading.layout([(span, None) for span in reading.spans]), _chunk_of_rows(reading)
        canvas = backbone.canvas(workspace_size(backbone, len(layout), request.room))
        mass: ChunkMass | None = None
        if reading.spans:
            mass = ChunkMass(groups.to(backbone.device), frozenset(backbone.full_layers), backbone.sliding_window)
        with report.timed("recompute"):
            hooks = [] if mass is None else [mass]
            logits = backbone.forward(layout.ids, torch.arange(len(layout)), canvas, hooks=hooks)
        assert logits is not None
        if mass is not None:
            self._harvest(reading, groups, canvas, mass.mass, variants)
        report.fresh, report.canvas_bytes = len(layout), canvas.nbytes
        report.token_sources = sources_of(layout)
        return Prefill(layout, canvas, logits, report, backbone.on_canvas(canvas))

    def _harvest(
        self, reading: Reading, groups: Tensor, canvas: Canvas, mass: Tensor, variants: HarvestedVariants
    ) -> None:
        """Add the variants. ``groups [T]``: the chunk of each row; ``mass [T, chunks]``: its attention to chunks."""
        spans, tokens = reading.spans, reading.tokens
        lengths = torch.bincount(groups + 1, minlength=len(spans) + 1)[1:]
        for number, span in enumerate(spans):
            if span.key not in self._collections.index:
                break  # forgotten since the prompt was read, and what follows was computed behind it
            rows = (groups == number).nonzero()[:, 0]
            if not len(rows) or not self._collections.index.whole(span):
                continue
            keys, values = canvas.read(slice(int(rows[0]), int(rows[-1]) + 1))
            offsets = tokens.offsets[rows] - span.start
            text = reading.prompt[span.start : span.end]
            kv = ChunkKV(text, tokens.ids[rows], offsets, keys.cpu(), values.cpu(), position=int(rows[0]))
            before = [(s.key, j) for j, s in enumerate(spans[:number]) if int(lengths[j])]
            variants.add(span.key, harvest(kv, number, before, mass[rows].cpu(), lengths))


def _chunk_of_rows(reading: Reading) -> Tensor:
    """``[T]`` int64: the number of the span that contains the token, -1 for none."""
    starts, ends = reading.tokens.offsets.T
    groups = torch.full((len(reading.tokens),), -1)
    for number, span in enumerate(reading.spans):
        groups[(starts >= span.start) & (ends <= span.end)] = number
    return groups


def _load(reading: Reading, variants: HarvestedVariants) -> Loaded:
    """For each span, the variant with the lowest fix-up overhead, which is added as ``extra["overhead"]``."""
    names = [span.key for span in reading.spans]
    chunks: list[ChunkKV | None] = []
    for number, name in enumerate(names):
        if (found := variants.best(name, names[:number])) is None:
            chunks.append(None)
            continue
        variant, overhead = found
        extra = {**variant.kv.extra, "overhead": torch.full((len(variant.kv),), overhead, dtype=torch.float32)}
        chunks.append(replace(variant.kv, extra=extra))
    return Loaded(chunks, in_place=False)  # a variant that needs no repair has an overhead of 0
