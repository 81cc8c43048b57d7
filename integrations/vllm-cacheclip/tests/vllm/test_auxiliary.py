"""CacheClip's auxiliary model beside vLLM's worker: the rows it chooses are those of the library's engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cacheclip_vllm import auxiliary
from serving import PASSAGES, QUESTION, Served, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from cacheclip_rag import Engine
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.store import Place

ORDERS = [PASSAGES[k:] + PASSAGES[:k] for k in range(5)]


@pytest.fixture(scope="module")
def helper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights than the served model's."""
    return save_tiny(tmp_path_factory.mktemp("auxiliary"), "qwen2", seed=1)


@pytest.fixture(scope="module")
def aided(folder: Path, helper: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(auxiliary.Backbone, "load", lambda path, device: backbone(path))  # not in bfloat16
        made = Served(folder, tmp_path_factory.mktemp("store"), extra={"auxiliary": str(helper)})
    made.encode(PASSAGES)
    yield made
    made.close()


def backbone(path: Path) -> Backbone:
    return Backbone(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
    )


def recomputed(runs: list[tuple[str, int]]) -> list[int]:
    rows, at = list[int](), 0
    for source, count in runs:
        rows += range(at, at + count) if source == "recomputed" else []
        at += count
    return rows


@pytest.mark.parametrize("head", ["", "Read.\n\n"])
def test_it_chooses_the_rows_that_it_chooses_in_the_library(
    aided: Served, folder: Path, helper: Path, head: str
) -> None:
    engine = Engine(backbone(folder), auxiliary=backbone(helper))
    engine.ensure(PASSAGES)
    others = 0
    for order in ORDERS:
        chat = engine.backbone.chat([{"role": "user", "content": head + "\n\n".join([*order, QUESTION])}])
        expected = engine.generate(chat, method="cacheclip", max_new_tokens=12, temperature=0)
        [(answer, report)] = aided.ask([aided.prompt(order, head=head)])
        assert expected.report.token_sources is not None and report["method"] == "cacheclip"
        rows = recomputed([(run.source.name.lower(), run.tokens) for run in expected.report.token_sources.runs()])
        assert recomputed(report["sources"]) == rows and not report["fallbacks"]
        assert answer[: len(expected.ids)] == list(expected.ids)
        [(_, itself)] = aided.ask([aided.prompt(order, head=head)], method="auto")
        others += recomputed(itself["sources"]) != rows
    assert others == len(ORDERS)  # the served model would have chosen other rows


def test_its_chunks_are_forgotten_with_the_models_own(aided: Served) -> None:
    text = "A sentence about a ferry that nobody has told so far, and that is long enough to be a chunk of its own. "
    place = Place(aided.store, 0, 1 << 40)

    def files() -> int:
        return sum(1 for _ in aided.store.rglob("*.safetensors"))

    before = files()
    aided.encode([text])
    aided.ask([aided.prompt([PASSAGES[0], text])])
    assert files() == before + 2
    place.forget_everywhere({place.documents.text(text)})
    assert files() == before
    assert aided.ask([aided.prompt([text, PASSAGES[0]])])[0][1]["chunks"] == 1


def test_its_failure_costs_time_only(aided: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    ids = aided.prompt(PASSAGES)
    monkeypatch.setattr(auxiliary.Auxiliary, "score", fail)
    [(answer, report)] = aided.ask([ids])
    assert "on purpose" in report["fallbacks"][0] and answer == aided.ask([ids], reuse=False)[0][0]


def test_without_one_the_method_is_refused(served: Served) -> None:
    [(_, report)] = served.ask([served.prompt(PASSAGES)], method="cacheclip")
    assert "--auxiliary" in report["fallbacks"][0]
