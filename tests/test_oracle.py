"""The oracle says what recomputing one row changes, and the claims about trained weights are what rows say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from cacheclip_eval.data import Item, Passage, prompt
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import Engine
from cacheclip_rag.kv.encode import Isolated
from cacheclip_rag.methods import Method
from cacheclip_rag.verification import kl

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from oracle import ANSWER, gains, table
from trained import OWN, claims

ITEM = Item("1", "Who drove the last train?", ("Marguerite Okafor",), tuple(Passage("", p) for p in PASSAGES[:3]))


class Only:
    """Selects one row."""

    needs_auxiliary: ClassVar[bool] = False

    def __init__(self, row: int) -> None:
        self.row = row

    def select(self, request: Any, budget: int) -> torch.Tensor:
        return torch.tensor([self.row])


def test_a_row_s_gain_is_what_the_engine_gains_by_recomputing_it() -> None:
    with Engine(tiny_backbone(), method="naive") as engine:
        engine.ensure([passage.chunk for passage in ITEM.passages])
        found = gains(engine, ITEM, stride=13)
        text = prompt(ITEM, engine.backbone)
        answer = list(engine.generate(text, method="full", max_new_tokens=ANSWER).ids)
        expected = engine.prefill(text, method="full", room=ANSWER + 1).forced(answer)

        def distance(method: Any) -> float:
            done = engine.prefill(text, question=ITEM.question, method=method, recompute_ratio=0.5, room=ANSWER + 1)
            return float(kl(expected, done.forced(answer)))

        base = distance("naive")
        assert found["kl"] == pytest.approx(base, rel=1e-3) and base > 0
        assert len(found["rows"]) > 5
        for row, gain in zip(found["rows"], found["gains"], strict=True):
            assert gain == pytest.approx(base - distance(Method("one", Only(row), Isolated())), abs=1e-4 * base)


def test_a_row_s_gain_does_not_hang_on_the_rows_before_it() -> None:
    def found(stride: int) -> list[float]:
        with Engine(tiny_backbone(), method="naive") as engine:
            engine.ensure([passage.chunk for passage in ITEM.passages])
            return list(gains(engine, ITEM, stride)["gains"])

    assert found(26) == found(13)[::2], "to the bit: all that a row changed is as it was"


def test_a_system_is_judged_by_the_best_rows_of_as_many_as_it_took() -> None:
    best = {"dataset": "d", "id": "1", "system": "oracle", "rows": [0, 4, 8, 12], "gains": [3.0, 0.0, 1.0, -1.0]}
    chosen = {"dataset": "d", "id": "1", "system": "half", "chosen": [0, 1, 2, 3, 4, 5, 6, 7]}
    text = table([{**best, "context": 16}, chosen])
    # Half of 16 rows: the best two of four are 0 and 8, of which it took 0; it gained 3 of 4.
    assert "| `half` | 0.50 " in text and "| 0.75 " in text


CARD = {"kind": "blocks", "uses": "blockattention:adapter=FOLDER", "training": {"tokens": 1000}}


def scores(tuned: float, spread: float = 0.01) -> dict[str, Any]:
    """Ten questions: plain reuse loses 0.5 nats to full prefill, the adapter ``tuned`` to full attention with it."""

    def rows(nll: float) -> dict[tuple[str, str], dict[str, float]]:
        return {(OWN, str(n)): {"nll": nll + spread * (n % 3), "kl": 0.1, "score": 0.0} for n in range(10)}

    return {
        "full": rows(2.0),
        "promptcache": rows(2.5),
        "full:adapter=adapters/blockattention": rows(1.0),
        "blockattention:adapter=adapters/blockattention": {
            key: {**row, "nll": row["nll"] + (0.02 if int(key[1]) % 2 else -0.02)}
            for key, row in rows(1 + tuned).items()
        },
    }


@pytest.mark.parametrize(
    ("tuned", "verdict"),
    [(0.1, "| shown at 1,000 tokens"), (0.5, "| not shown at 1,000 tokens"), (0.8, "**contradicted** at 1,000")],
)
def test_a_claim_is_decided_by_its_interval(tuned: float, verdict: str) -> None:
    text = claims([scores(tuned)], {"blockattention": CARD})
    assert "Block-Attention" in text and verdict in text and "KVLink" not in text
