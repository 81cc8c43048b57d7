"""A³: the tokens that the question's first-layer queries attend to most."""

from __future__ import annotations

import torch
from oracles import embed, watch
from tiny import PASSAGES, tiny_backbone, tiny_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cacheclip_rag import Engine

PROMPT = "Read:\n" + "\n\n".join(PASSAGES[:3]) + "\n\nWho drove the last train?"


def test_a3_takes_what_layer_0_of_a_full_prefill_attends_to() -> None:
    """Queries and keys as Llama's first layer computes them for all rows, each head's softmax over the context."""
    engine = Engine(tiny_backbone("llama"), method="a3")
    engine.ensure(PASSAGES[:3])
    _, request, seen = watch(engine, "a3", PROMPT)
    model, ids = tiny_model("llama").model, request.layout.ids
    with torch.inference_mode():
        x = model.layers[0].input_layernorm(embed(ids))
        attention = model.layers[0].self_attn
        q, k = (p(x).unflatten(1, (-1, 16)).transpose(0, 1)[None] for p in (attention.q_proj, attention.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *model.rotary_emb(x, torch.arange(len(ids))[None]))
        logits = q[0][:, request.question_rows] @ k[0].repeat_interleave(2, dim=0)[:, request.rows].mT / 4.0
        scores = logits.softmax(dim=-1).sum(dim=(0, 1))
    budget = int(0.15 * len(request.rows))
    expected = request.rows[scores.sort(descending=True, stable=True).indices[:budget].sort().values]
    assert len(request.question_rows) > 10 and torch.equal(seen["chosen"], expected)


def test_a3_asks_no_layer_beyond_the_first(monkeypatch: object) -> None:
    """Its selection runs one layer, and only over what has no stored KV."""
    engine = Engine(tiny_backbone("llama"), method="a3")
    engine.ensure(PASSAGES[:3])
    computer = engine.backbone.computer
    passes, forward = [], type(computer).forward_one

    def noted(self: object, part: object, **options: object) -> object:
        passes.append((len(part.rows), options.get("depth")))  # type: ignore[attr-defined]
        return forward(self, part, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(computer), "forward_one", noted)  # type: ignore[attr-defined]
    report = engine.prefill(PROMPT).report
    assert passes == [(report.fresh, 1), (report.fresh + report.recomputed, None)]
