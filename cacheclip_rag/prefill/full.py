"""Full prefill: every token of the prompt is computed."""

from __future__ import annotations

import torch

from ..kv.collections import Collections
from ..model.backbone import Backbone
from ..report import Report
from .reading import Reading, workspace_size
from .result import Prefill, PrefillRequest
from .sources import sources_of


class Full:
    """The strategy ``full``. Chunks are recognised nevertheless, because control tokens inside them are plain text."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections

    def __call__(self, request: PrefillRequest, reading: Reading, report: Report) -> Prefill:
        backbone, layout = self._collections.backbone_of(request.method.encode), reading.layout()
        canvas = backbone.canvas(workspace_size(backbone, len(layout), request.room))
        with report.timed("recompute"):
            logits = backbone.forward(layout.ids, torch.arange(len(layout)), canvas)
        assert logits is not None
        report.fresh, report.canvas_bytes = len(layout), canvas.nbytes
        report.token_sources = sources_of(layout)
        return Prefill(layout, canvas, logits, report, backbone.on_canvas(canvas))


class Native:
    """Full prefill with transformers' own attention and cache, for a model whose KV cannot be moved."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def __call__(self, request: PrefillRequest, reading: Reading, report: Report) -> Prefill:
        layout = reading.layout()
        logits, step = self._backbone.native_prefill(layout.ids)
        report.fresh = len(layout)
        report.token_sources = sources_of(layout)
        return Prefill(layout, None, logits, report, step)
