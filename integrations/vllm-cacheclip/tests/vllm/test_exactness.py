"""What is reused inside vLLM equals vLLM without us where it must, and the library's own engine where it may differ."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import PASSAGES, QUESTION, Served
from transformers import AutoModelForCausalLM, AutoTokenizer

from cacheclip_rag import Engine
from cacheclip_rag.model.backbone import Backbone

METHODS = [
    "auto",
    "naive",
    "random",
    "query_guided",
    "prophetkv",
    "infoflow",
    "infoflow:queries=both",
    "auto:queries=last",
    "fusionrag",
    "fusionrag_selection",
    "a3",
    "epic",
    "legolink",
    "cacheblend",
    "promptcache",
    "link0",
]
ORDERS = [PASSAGES[k:] + PASSAGES[:k] for k in range(5)]


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    """The library's engine over the same weights, with the same chunks."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = Engine(Backbone(model, AutoTokenizer.from_pretrained(folder)))
    for method in METHODS:
        engine.ensure(PASSAGES, method=method)
    return engine


def recomputed(runs: Any) -> list[int]:
    rows, at = list[int](), 0
    for source, count in runs:
        rows += range(at, at + count) if source == "recomputed" else []
        at += count
    return rows


@pytest.mark.parametrize(
    "method", [name for name in METHODS if name not in ("naive", "promptcache", "link0", "legolink")]
)
@pytest.mark.parametrize("head", ["", "Read.\n\n"])
def test_recomputing_everything_equals_plain_vllm(served: Served, method: str, head: str) -> None:
    prompts = [served.prompt(order, head=head) for order in ORDERS]
    plain = served.ask(prompts, reuse=False)
    got = served.ask(prompts, method=method, recompute_ratio=1.0)
    for (expected, _), (answer, report) in zip(plain, got, strict=True):
        assert not report["fallbacks"]
        assert sum(report["tokens"].values()) == report["prompt_tokens"]
        assert answer == expected
        assert not report["tokens"].get("reused")


@pytest.mark.parametrize("passage", PASSAGES)
def test_a_chunk_behind_its_prefix_is_exact(served: Served, passage: str) -> None:
    prompt = served.prompt([passage])
    [(expected, _)], [(answer, report)] = served.ask([prompt], reuse=False), served.ask([prompt], method="naive")
    assert answer == expected
    assert set(report["tokens"]) <= {"fresh", "in_place", "prefix"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", ["", "Read.\n\n"])
def test_every_method_does_what_it_does_in_the_library(served: Served, engine: Engine, method: str, head: str) -> None:
    """The same rows are recomputed, and the answers have the same tokens."""
    for order in ORDERS:
        content = head + "\n\n".join([*order, QUESTION])
        expected = engine.generate(
            engine.backbone.chat([{"role": "user", "content": content}]),
            method=method,
            max_new_tokens=12,
            temperature=0,
        )
        [(answer, report)] = served.ask([served.prompt(order, head=head)], method=method)
        assert expected.report.token_sources is not None
        runs = [(run.source.name.lower(), run.tokens) for run in expected.report.token_sources.runs()]
        assert recomputed(report["sources"]) == recomputed(runs)
        assert report["requested_ratio"] == pytest.approx(expected.report.requested_ratio)
        assert answer[: len(expected.ids)] == list(expected.ids)


def test_the_first_token_is_distributed_as_in_the_library(served: Served, engine: Engine) -> None:
    """KL below 1e-6 in float32, for ``auto`` at its default ratio."""
    for order in ORDERS:
        content = "\n\n".join([*order, QUESTION])
        prompt = engine.backbone.chat([{"role": "user", "content": content}])
        expected = engine.prefill(prompt, method="auto").logits[0].log_softmax(dim=-1)
        got = served.first_token(served.prompt(order), method="auto")
        assert float((expected.exp() * (expected - got)).sum()) < 1e-6


def test_a_question_before_the_context(served: Served, engine: Engine) -> None:
    """Selection then needs a copy of the question behind the prompt, in blocks that no request has."""
    for order in ORDERS:
        content = "\n\n".join([QUESTION, *order])
        messages = [{"role": "user", "content": content}]
        expected = engine.generate(engine.backbone.chat(messages), method="auto", max_new_tokens=12, temperature=0)
        ids = served.model.tokenise_prompt(served.model.chat(messages)).ids.tolist()
        [(answer, report)] = served.ask([ids], method="auto")
        assert expected.report.token_sources is not None
        runs = [(run.source.name.lower(), run.tokens) for run in expected.report.token_sources.runs()]
        rows, others = set(recomputed(report["sources"])), set(recomputed(runs))
        assert len(rows & others) >= 0.9 * len(others)  # its words are cut otherwise when they stand alone
        assert not report["fallbacks"] and len(answer) == 12
    assert served.llm.reset_prefix_cache()  # the blocks are given back


def test_requests_together_equal_one_after_another(served: Served) -> None:
    """Several fill their blocks in one pass, among them requests without reuse, and with other methods and ratios."""
    kinds: list[dict[str, Any]] = [
        {},
        {"reuse": False},
        {"method": "cacheblend"},
        {"method": "infoflow"},
        {"recompute_ratio": 1.0},
        {"method": "link0"},
    ]
    jobs = [(served.prompt(order, head=head), kind) for order in ORDERS for head in ("", "Read.\n\n") for kind in kinds]
    random.Random(0).shuffle(jobs)
    alone = [served.ask([ids], **kind)[0][0] for ids, kind in jobs]
    together = served.ask_each(jobs)
    assert [answer for answer, _ in together] == alone
    assert max(report["pass"]["requests"] for _, report in together if "pass" in report) > 1


def test_reuse_leaves_nothing_in_vllms_prefix_cache(served: Served) -> None:
    """Approximate blocks are neither found by a plain request nor by the next turn of the chat; the beginning is."""
    prompts = [served.prompt(order, head="Another beginning. ") for order in ORDERS]
    answers = [answer for answer, _ in served.ask(prompts, method="naive")]
    assert all(cached < served.block for cached in served.cached(prompts, reuse=False))
    turns = [[*ids, *answer, *served.prompt([PASSAGES[0]])] for ids, answer in zip(prompts, answers, strict=True)]
    assert all(
        cached <= served.block * (len(ids) // served.block)
        for cached, ids in zip(served.cached(turns, reuse=False), prompts, strict=True)
    )
