"""What vLLM's ``/metrics`` says about reuse are the reports' numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from cacheclip_vllm.metrics import ReuseStats, kind_of
from cacheclip_vllm.plan import Done
from serving import PASSAGES, Served

from cacheclip_rag.store import LoadingCost
from cacheclip_rag.store.loading_cost import DISK


def now(served: Served) -> Counter[tuple[str, str]]:
    """The counters by name and label, of all engines of this process."""
    found = Counter[tuple[str, str]]()
    for metric in served.llm.get_metrics():
        if metric.name.startswith("vllm:cacheclip_"):
            [label] = [value for name, value in metric.labels.items() if name in ("source", "reuse", "kind")]
            found[metric.name.removeprefix("vllm:cacheclip_"), label] += metric.value
    return found


@pytest.fixture
def counted(served: Served) -> Iterator[Any]:
    before = now(served)
    yield lambda: {name: number for name, number in (now(served) - before).items() if number}


def test_tokens_are_those_of_the_reports(served: Served, counted: Any) -> None:
    prompts = [served.prompt(PASSAGES[k:] + PASSAGES[:k], head=f"Beginning {k}. ") for k in range(3)]
    reports = [report for _, report in served.ask(prompts, recompute_ratio=0.3)]
    expected = sum((Counter(report["tokens"]) for report in reports), Counter[str]())
    got = counted()
    assert {label: number for (name, label), number in got.items() if name == "prompt_tokens"} == expected
    assert sum(expected.values()) == sum(map(len, prompts))
    assert {key: number for key, number in got.items() if key[0] != "prompt_tokens"} == {("requests", "yes"): 3}


def test_reports_that_nobody_asked_for_are_counted(served: Served, counted: Any) -> None:
    served.ask([served.prompt(PASSAGES)], report=False, sources=False)
    assert counted()["requests", "yes"] == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"reuse": False}, {("requests", "unwanted"): 1}),
        ({"method": "ape"}, {("requests", "fallback"): 1, ("fallbacks", "options"): 1}),
        ({"recompute_ratio": 2}, {("requests", "fallback"): 1, ("fallbacks", "options"): 1}),
    ],
)
def test_requests_left_to_vllm(served: Served, counted: Any, options: dict[str, Any], expected: Any) -> None:
    served.ask([served.prompt(PASSAGES)], **options)
    assert counted() == expected


def test_prompts_without_known_chunks_are_no_fallbacks(served: Served, counted: Any) -> None:
    served.ask([served.prompt(["A passage that nobody has added to the store of these tests. " * 4])])
    assert counted() == {("requests", "unknown"): 1}


def test_what_vllm_must_do_itself(served: Served, counted: Any) -> None:
    served.ask_each([(served.prompt(PASSAGES), {})], prompt_logprobs=0)
    assert counted() == {("requests", "fallback"): 1, ("fallbacks", "request"): 1}


def test_a_failure_is_counted(served: Served, counted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from cacheclip_vllm import computer

    def fail(*args: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(computer.PagedWorkspace, "place", fail)
    served.ask([served.prompt(PASSAGES, head="To fail. ")])
    assert counted() == {("requests", "fallback"): 1, ("fallbacks", "failure"): 1}


def test_encoding_a_chunk_is_no_request(served: Served, counted: Any) -> None:
    served.encode(["A passage that is encoded here, and asked for by no prompt of these tests at all. " * 2])
    assert counted() == {}


def test_kinds_are_told_by_the_sentences_that_reports_have() -> None:
    assert kind_of('not encoded as link0 wants it: add its chunks with "method": "link0"') == "chunk"
    assert kind_of("its stored KV is gone or damaged") == "chunk"
    assert kind_of("9,000 rows would have to be computed in one pass of at most 2,048: lower the ratio") == "size"
    cost = LoadingCost()
    for _ in range(9):
        cost.loaded(DISK, 1 << 20, 9.0)
        cost.computed(100, 0.1)
    assert kind_of(str(cost.why_computed(DISK, 1 << 20, 100))) == "loading"
    full = "full prefill: 7 of 900 tokens have stored KV, in 7 pieces; putting them together would take longer"
    assert kind_of(full) == "size"


def test_stats_add_up_over_steps() -> None:
    """They travel between vLLM's processes as plain data, and are summed up there."""
    one, two = ReuseStats(), ReuseStats()
    assert one.is_empty()
    report = {"tokens": {"reused": 5, "fresh": 2}, "fallbacks": ["its stored KV is gone or damaged"]}
    one.done(Done(report))
    two.done(Done(report))
    two.left("not wanted")
    total = ReuseStats(dict(one.to_dict())).aggregate(two)
    assert total.reduce() == {
        "yes requests": 2,
        "unwanted requests": 1,
        "reused prompt_tokens": 10,
        "fresh prompt_tokens": 4,
        "chunk fallbacks": 2,
    }
    total.reset()
    assert total.is_empty()
