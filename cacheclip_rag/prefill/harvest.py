"""Reuse of what earlier prompts left: Cache-Craft's life of a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..chunks import ChunkKV
from ..kv.encode import Harvested, HarvestedVariants
from ..kv.encode.harvested import ChunkMass, harvest
from ..kv.library import Library
from ..methods import Method
from ..prompt import ChunkIndex, Span, align
from ..report import Report
from .compose import Prefill, Reuse, fitting, recognise, slots, token_sources


class Harvesting(Reuse):
    """A prompt all of whose chunks have a variant is put together from them; any other is prefilled and harvested."""

    def __init__(self, library: Library, index: ChunkIndex, recipe: Harvested) -> None:
        super().__init__(library, index)
        self.variants = HarvestedVariants(recipe)

    def __call__(self, prompt: str, method: Method, ratio: float, room: int, report: Report, **options: Any) -> Prefill:
        spans = recognise(self._backbone, self._index, prompt, options.get("hints", ()))
        if spans and all(span.key in self.variants for span in spans):
            return super().__call__(prompt, method, ratio, room, report, **options)
        return self._cold(prompt, spans, room, report)

    def forget(self, text: str, name: str) -> None:
        super().forget(text, name)
        self.variants.forget(name)

    def _cold(self, prompt: str, spans: Sequence[Span], room: int, report: Report) -> Prefill:
        """Full prefill; every chunk that stands whole in the prompt leaves a variant."""
        backbone = self._backbone
        tokens = fitting(backbone, backbone.tokenise_prompt(prompt, [(s.start, s.end) for s in spans]))
        layout = align(prompt, tokens.ids, tokens.offsets, spans, [None] * len(spans))
        groups = torch.full((len(tokens),), -1)
        for number, span in enumerate(spans):
            groups[(tokens.offsets[:, 0] >= span.start) & (tokens.offsets[:, 1] <= span.end)] = number
        canvas = backbone.canvas(slots(backbone, len(tokens), room))
        probe: ChunkMass | None = None
        if spans:
            probe = ChunkMass(groups.to(backbone.device), frozenset(backbone.full_layers), backbone.sliding_window)
        with report.timed("recompute"):
            logits = backbone.forward(tokens.ids, torch.arange(len(tokens)), canvas, probe=probe)
        assert logits is not None
        lengths = torch.tensor([int((groups == number).sum()) for number in range(len(spans))])
        for number, span in enumerate(spans):
            rows = (groups == number).nonzero()[:, 0]
            if probe is None or not len(rows) or len(span) != len(self._index.text(span.key) or ""):
                continue
            keys, values = canvas.read(slice(int(rows[0]), int(rows[-1]) + 1))
            offsets = tokens.offsets[rows] - span.start
            text = prompt[span.start : span.end]
            kv = ChunkKV(text, tokens.ids[rows], offsets, keys.cpu(), values.cpu(), position=int(rows[0]))
            before = [(s.key, j) for j, s in enumerate(spans[:number]) if int(lengths[j])]
            self.variants.add(span.key, harvest(kv, number, before, probe.mass[rows].cpu(), lengths))
        report.prompt_tokens = report.fresh = len(tokens)
        report.canvas_bytes = canvas.nbytes
        report.token_sources = token_sources(layout)
        return Prefill(layout, canvas, logits, report, backbone.on_canvas(canvas))

    def _load(self, keys: Sequence[str], method: Method) -> tuple[list[ChunkKV | None], dict[str, str]]:
        chunks: list[ChunkKV | None] = []
        for number, key in enumerate(keys):
            if (found := self.variants.best(key, keys[:number])) is None:
                chunks.append(None)
                continue
            variant, overhead = found
            extra = {**variant.kv.extra, "overhead": torch.full((len(variant.kv),), overhead)}
            chunks.append(replace(variant.kv, extra=extra))
        return chunks, {}

    def _exact_rows(self, layout: Any, chunks: Any) -> torch.Tensor:
        return torch.zeros(len(layout), dtype=torch.bool)  # the overhead of 0 says it instead
