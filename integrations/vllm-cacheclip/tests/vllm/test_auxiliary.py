"""CacheClip's auxiliary model beside vLLM's worker: the rows it chooses are those of the library's engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serving import PASSAGES, QUESTION, Served
from transformers import AutoModelForCausalLM, AutoTokenizer

from cacheclip_rag import Engine
from cacheclip_rag.methods.auxiliary import Auxiliary
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.store import Place

ORDERS = [PASSAGES[k:] + PASSAGES[:k] for k in range(5)]


def recomputed(runs: list[tuple[str, int]]) -> list[int]:
    rows, at = list[int](), 0
    for source, count in runs:
        rows += range(at, at + count) if source == "recomputed" else []
        at += count
    return rows


@pytest.mark.parametrize("head", ["", "Read.\n\n"])
def test_it_chooses_the_rows_that_it_chooses_in_the_library(
    served: Served, folder: Path, auxiliary: Path, head: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = Engine(Backbone(model, AutoTokenizer.from_pretrained(folder)), auxiliary=auxiliary)
    engine.ensure(PASSAGES)
    others = 0
    for order in ORDERS:
        chat = engine.backbone.chat([{"role": "user", "content": head + "\n\n".join([*order, QUESTION])}])
        expected = engine.generate(chat, method="cacheclip", max_new_tokens=12, temperature=0)
        [(answer, report)] = served.ask([served.prompt(order, head=head)], method="cacheclip")
        assert expected.report.token_sources is not None and report["method"] == "cacheclip"
        rows = recomputed([(run.source.name.lower(), run.tokens) for run in expected.report.token_sources.runs()])
        assert recomputed(report["sources"]) == rows and not report["fallbacks"]
        assert answer[: len(expected.ids)] == list(expected.ids)
        [(_, itself)] = served.ask([served.prompt(order, head=head)], method="auto")
        others += recomputed(itself["sources"]) != rows
    assert others == len(ORDERS)  # the served model would have chosen other rows


def test_its_chunks_are_forgotten_with_the_models_own(served: Served) -> None:
    text = "A sentence about a ferry that nobody has told so far, and that is long enough to be a chunk of its own. "
    place = Place(served.store, 0, 1 << 40)

    def files() -> int:
        return sum(1 for _ in served.store.rglob("*.safetensors"))

    before = files()
    served.encode([text])
    served.ask([served.prompt([PASSAGES[0], text])])
    assert files() == before + 2
    place.forget_everywhere({place.documents.text(text)})
    assert files() == before
    assert served.ask([served.prompt([text, PASSAGES[0]])])[0][1]["chunks"] == 1


def test_its_failure_costs_time_only(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    ids = served.prompt(PASSAGES)
    monkeypatch.setattr(Auxiliary, "score", fail)
    [(answer, report)] = served.ask([ids], method="cacheclip")
    assert "on purpose" in report["fallbacks"][0] and answer == served.ask([ids], reuse=False)[0][0]
