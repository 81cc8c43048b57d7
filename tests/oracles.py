"""What the methods' tests measure against: eager transformers, and Llama's layers written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tiny import tiny_model
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cacheclip_rag import Engine
from cacheclip_rag.methods import Method, resolve
from cacheclip_rag.methods.recompute.base import Recomputed
from cacheclip_rag.methods.request import Request
from cacheclip_rag.model.layers import cache_argument
from cacheclip_rag.prefill.result import Prefill


def distance(a: Tensor, b: Tensor) -> float:
    """Relative error of ``a``."""
    return float(((a.float() - b.float()).norm() / b.float().norm()).detach())


# ---- oracles -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def own(kind: str, ids: Tensor, positions: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' eager forward: ``keys``, ``values [L, Hk, T, D]``, hidden states, attentions, logits."""
    cache = DynamicCache()
    model = tiny_model(kind, dtype)
    output = model(
        input_ids=ids[None],
        position_ids=None if positions is None else positions[None],
        output_hidden_states=True,
        output_attentions=True,
        **{cache_argument(model): cache},
    )
    output.keys = torch.stack([layer.keys[0] for layer in cache.layers])
    output.values = torch.stack([layer.values[0] for layer in cache.layers])
    return output


Weigh = Callable[[int, Tensor, Tensor], Tensor]


def softmax(layer: int, logits: Tensor, rows: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


@torch.inference_mode()
def by_hand(
    x: Tensor, rows: Tensor, positions: Tensor, kv: tuple[Tensor, Tensor], layers: range, weigh: Weigh = softmax
) -> Tensor:
    """Llama's layers over scattered rows: ``x [S, d]`` in and out, ``kv [L, Hk, N, D]`` is overwritten at the rows."""
    model = tiny_model("llama").model
    for number in layers:
        layer, (keys, values) = model.layers[number], (t[number] for t in kv)
        h = layer.input_layernorm(x)
        projections = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        q, k, v = (p(h).unflatten(1, (-1, 16)).transpose(0, 1)[None] for p in projections)
        q, k = apply_rotary_pos_emb(q, k, *model.rotary_emb(x, positions[None]))
        keys[:, rows], values[:, rows] = k[0], v[0]
        logits = q[0] @ keys.repeat_interleave(2, dim=0).mT / 4.0
        logits = logits.masked_fill(torch.arange(keys.shape[1]) > rows[:, None], -math.inf)
        out = weigh(number, logits, rows) @ values.repeat_interleave(2, dim=0)
        x = x + layer.self_attn.o_proj(out.transpose(0, 1).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return x


@torch.inference_mode()
def finish(x: Tensor) -> Tensor:
    model = tiny_model("llama")
    return model.lm_head(model.model.norm(x[-1:]))


@torch.inference_mode()
def embed(ids: Tensor) -> Tensor:
    return tiny_model("llama").model.embed_tokens(ids)


# ---- looking into a request ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Watched:
    """A way of recomputing that notes what it was given."""

    inner: Any
    seen: dict[str, Any] = field(default_factory=dict)

    def run(self, request: Request, chosen: Tensor, score_mod: Any) -> Recomputed:
        canvas: Any = request.workspace
        stored = tuple(t.clone() for t in canvas.read(slice(len(request.layout))))
        self.seen.update(request=request, chosen=chosen, score_mod=score_mod, stored=stored)
        return self.inner.run(request, chosen, score_mod)


def watch(engine: Engine, method: str | Method, text: str, **options: Any) -> tuple[Prefill, Request, Any]:
    method = resolve(method)
    watched = Watched(method.recompute)
    result = engine.prefill(text, method=replace(method, recompute=watched), **options)
    assert result.report.fallbacks == []
    return result, watched.seen["request"], watched.seen


def rows_of(request: Request) -> list[Tensor]:
    """The canvas rows of each chunk's stored tokens."""
    return [(request.layout.chunk == number).nonzero()[:, 0] for number in range(len(request.layout.spans))]


def together(*rows: Tensor) -> Tensor:
    return torch.cat(rows).sort().values


def assert_prefill_and_a_decoded_token(result: Prefill, seen: dict[str, Any], positions: Tensor, weigh: Weigh) -> None:
    """The prompt's last logits and those of one more token are what attention weighed by hand gives."""
    request, new = seen["request"], torch.tensor([65])
    ids, count = torch.cat([request.layout.ids, new]), len(request.layout)
    kv = tuple(torch.cat([t, t.new_zeros(*t.shape[:2], 1, t.shape[3])], dim=2) for t in seen["stored"])
    for rows, logits in (
        (together(request.fresh, seen["chosen"]), result.logits),
        (torch.tensor([count]), result.step(new, count)),
    ):
        assert distance(logits, finish(by_hand(embed(ids[rows]), rows, positions[rows], kv, range(4), weigh))) < 1e-4
