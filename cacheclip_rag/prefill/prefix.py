"""Prefix caching: full prefill behind the longest cached prefix of the prompt."""

from __future__ import annotations

import torch

from ..kv.collections import Collections
from ..report import Report
from .reading import Reading, workspace_size
from .result import Prefill, PrefillRequest
from .sources import sources_of


class Prefix:
    """The strategy ``prefix``: reuses KV behind exactly the same tokens and computes the rest, with the result of a
    full prefill.
    """

    def __init__(self, collections: Collections) -> None:
        self._collections = collections

    def __call__(self, request: PrefillRequest, reading: Reading, report: Report) -> Prefill:
        backbone, caching = self._collections.backbone, request.method.prefix_cache
        assert caching is not None
        cache = self._collections.prefix_cache(caching)
        layout, borders = reading.layout([(span, None) for span in reading.spans]), reading.borders
        count, known = len(layout), 0
        canvas = backbone.canvas(workspace_size(backbone, count, request.room))
        with report.timed("place"):
            for keys, values in cache.longest(layout.ids, borders):
                keys, values = keys[:, :, : count - 1 - known], values[:, :, : count - 1 - known]
                canvas.write(known, keys, values)
                known += keys.shape[2]
        with report.timed("recompute"):
            logits = backbone.forward(layout.ids[known:], torch.arange(known, count), canvas)
        assert logits is not None
        with report.timed("keep"):
            if all(
                span.key in self._collections.index for span in reading.spans
            ):  # none was forgotten since it was read
                cache.keep(layout.ids, borders, canvas, report.seconds["recompute"] / (count - known))
        report.prefix, report.fresh, report.canvas_bytes = known, count - known, canvas.nbytes
        report.token_sources = sources_of(layout, known)
        return Prefill(layout, canvas, logits, report, backbone.on_canvas(canvas))
