"""Cache hit rates over a stream of questions, in tokens, without computing any KV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.methods import resolve
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.model.canvas import Canvas
from cacheclip_rag.prefill.reading import borders_of
from cacheclip_rag.prompt import ChunkIndex, recognise
from cacheclip_rag.store import MemoryBudget

from .data import Item, prompt

ANYWHERE = "chunks anywhere"
"""The name of reuse at any position, as opposed to prefix caching."""

BYTES = 2
"""Bytes per token of the stand-in canvas: one for its key, one for its value."""


def hits(
    backbone: Backbone,
    items: Sequence[Item],
    methods: Sequence[str] = ("prefix-cache", "ragcache"),
    memory_bytes: int = 1 << 30,
) -> Iterator[dict[str, Any]]:
    """One row per item and prefix caching method, in order: ``prompt_tokens``, and how many of them are ``found`` in
    the cache of earlier prompts. The last row of an item, `ANYWHERE`: the tokens of chunks of earlier items.

    Prefix caching gives the answers of full prefill, so methods differ in their hit rates only. The first item finds
    nothing. Each method has ``memory_bytes`` of this model's KV; `ANYWHERE` has no limit.
    """
    index = ChunkIndex(backbone.quotes)
    per_token = 2 * backbone.layers * backbone.kv_heads * backbone.head_dim * backbone.dtype.itemsize
    caches = {}
    for name in methods:
        caching = resolve(name).prefix_cache
        if caching is None:
            raise ConfigurationError(f'"{name}" does no prefix caching: measure it with cacheclip eval')
        caches[name] = caching.open(MemoryBudget(memory_bytes * BYTES // per_token))
    seen: set[str] = set()
    for item in items:
        for passage in item.passages:
            index.add(passage.chunk, passage.chunk)
        text = prompt(item, backbone)
        recognised = recognise(text, index, backbone)
        spans, tokens = recognised.spans, backbone.tokenise_prompt(text, recognised.text)
        borders = borders_of(tokens, spans)
        canvas = Canvas(1, 1, 1, len(tokens), dtype=torch.int8, device="cpu")
        canvas.length = len(tokens)
        for name, cache in caches.items():
            found = sum(keys.shape[2] for keys, _ in cache.longest(tokens.ids, borders))
            cache.keep(tokens.ids, borders, canvas, 1.0)
            yield {"id": item.id, "method": name, "prompt_tokens": len(tokens), "found": min(found, len(tokens) - 1)}
        known = torch.zeros(len(tokens), dtype=torch.bool)
        for span in spans:
            if span.key in seen:
                known |= (tokens.offsets[:, 0] >= span.start) & (tokens.offsets[:, 1] <= span.end)
        seen |= {span.key for span in spans}
        yield {"id": item.id, "method": ANYWHERE, "prompt_tokens": len(tokens), "found": int(known.sum())}
