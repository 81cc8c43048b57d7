"""Whose attention chooses, and over which keys its softmax runs, against Llama's layers written out."""

from __future__ import annotations

import pytest
import torch
from oracles import by_hand, embed, watch
from tiny import PASSAGES, tiny_backbone
from torch import Tensor

from cacheclip_rag import Engine
from cacheclip_rag.methods import resolve

CHUNKS = "\n\n".join(PASSAGES[:3])
BEHIND = f"<|im_start|>Read:\n{CHUNKS}\n\nWho built it, and when was that?<|im_end|>\nAnswer:"
BEFORE = f"<|im_start|>Who built it? Read:\n{CHUNKS}\n\nAnswer:"


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = Engine(tiny_backbone("llama"), method="naive")
    engine.ensure(PASSAGES)
    return engine


def attention(seen: dict, request, rows: Tensor) -> dict[str, Tensor]:
    """Summed over the first two layers, heads and ``rows``: attention to the candidates, softmax over all keys a row
    sees, and inside each chunk."""
    kv = tuple(t.clone() for t in seen["stored"])
    total = {"row": torch.zeros(len(request.rows)), "chunk": torch.zeros(len(request.rows))}

    def weigh(layer: int, logits: Tensor, slots: Tensor) -> Tensor:
        probabilities = logits.softmax(dim=-1)
        asked = torch.isin(slots, rows)
        total["row"] += probabilities[:, asked][:, :, request.rows].sum(dim=(0, 1))
        for number in request.groups.unique():
            mine = request.groups == number
            total["chunk"][mine] += logits[:, asked][:, :, request.rows[mine]].softmax(dim=-1).sum(dim=(0, 1))
        return probabilities

    fresh = request.fresh
    by_hand(embed(request.layout.ids[fresh]), fresh, fresh, kv, range(2), weigh)
    return total


@pytest.mark.parametrize("normalise", ["row", "chunk"])
@pytest.mark.parametrize("queries", ["question", "last", "both"])
def test_tokens_are_chosen_by_the_attention_of_the_rows_that_ask(engine: Engine, queries: str, normalise: str) -> None:
    method = resolve("infoflow", layers=(0.0, 0.5), normalise=normalise, queries=queries)
    _, request, seen = watch(engine, method, BEHIND, recompute_ratio=0.2)
    rows = {"question": request.question_rows, "last": torch.tensor([len(request.layout) - 1])}
    asking = [rows[queries]] if queries in rows else list(rows.values())
    # However many rows ask, the question counts as much as the last token.
    total = sum(attention(seen, request, mine)[normalise] / len(mine) for mine in asking)
    best = total.topk(len(seen["chosen"])).indices.sort().values
    assert torch.equal(seen["chosen"], request.rows[best]) and len(best) == int(0.2 * len(request.rows))


def test_the_ways_differ(engine: Engine) -> None:
    chosen = []
    for queries in ("question", "last", "both"):
        for normalise in ("row", "chunk"):
            method = resolve("infoflow", normalise=normalise, queries=queries)
            chosen.append(tuple(watch(engine, method, BEHIND, recompute_ratio=0.2)[2]["chosen"].tolist()))
    assert len(set(chosen)) == 6


def test_the_last_token_needs_no_copy_of_a_question_in_front(engine: Engine) -> None:
    method = resolve("infoflow", layers=(0.0, 0.5), queries="last")
    _, request, seen = watch(engine, method, BEFORE, recompute_ratio=0.2, question="Who built it?")
    assert request.question_rows.max() < request.rows.min()
    total = attention(seen, request, request.fresh[-1:])["row"]
    best = total.topk(len(seen["chosen"])).indices.sort().values
    assert torch.equal(seen["chosen"], request.rows[best])
