"""Fairness and safety inside a step: budgets, shared beginnings, aborted requests, many at once."""

from __future__ import annotations

import random
from typing import Any

import pytest
from cacheclip_vllm import batch, filling
from serving import PASSAGES, Served, asking

ORDERS = [PASSAGES[k:] + PASSAGES[:k] for k in range(5)]
SYSTEM = "You answer questions about a small town by the sea, from passages only, briefly and without guessing. " * 3


def with_system(served: Served, passages: list[str]) -> list[int]:
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "\n\n".join([*passages, "Who drove the last train?"])},
    ]
    return served.model.tokenise_prompt(served.model.chat(messages)).ids.tolist()


def test_passes_and_steps_keep_to_the_budget(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a pass nor all plans of a step compute more rows than --max-num-batched-tokens."""
    most = served.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    steps, passes = list[int](), list[int]()
    fill, run = filling.Filler.fill, batch.run_forward

    def filled(self: Any, plans: Any, chunks: Any) -> Any:
        steps.append(sum(plan.cost for plan in plans))
        return fill(self, plans, chunks)

    def ran(model: Any, parts: Any, depth: Any) -> None:
        passes.append(sum(len(part.rows) for part in parts))
        run(model, parts, depth)

    monkeypatch.setattr(filling.Filler, "fill", filled)
    monkeypatch.setattr(batch, "run_forward", ran)
    served.ask([served.prompt(order) for order in ORDERS * 3], recompute_ratio=0.9)
    assert len(steps) > 1 and max(steps) <= most and max(passes) <= most


def test_the_beginning_is_shared_and_exact(served: Served) -> None:
    """A system prompt that vLLM has cached is neither computed again nor written; answers are those of a cold cache."""
    prompts = [with_system(served, order) for order in ORDERS]
    plain = [served.ask([ids], reuse=False)[0][0] for ids in prompts]
    for method in ("auto", "infoflow", "cacheblend"):
        whole = served.ask(prompts, method=method, recompute_ratio=1.0)
        assert [answer for answer, _ in whole] == plain
        assert all(report["tokens"]["prefix"] >= served.block for _, report in whole[1:])
        assert served.llm.reset_prefix_cache()  # no block of the pool is kept
        cold = [served.ask([ids], method=method)[0][0] for ids in prompts[:1]]
        warm = [served.ask([ids], method=method)[0][0] for ids in prompts[:1]]
        assert cold == warm


@pytest.mark.parametrize("kinds", [({"reuse": False}, {}), ({}, {}), ({}, {"reuse": False}), ({"method": "naive"}, {})])
def test_a_beginning_that_is_computed_in_the_same_step(served: Served, kinds: tuple[dict[str, Any], ...]) -> None:
    """It counts as cached for the second request, which must not be filled before it is there."""
    beginning = f"A beginning that no prompt has had so far, {kinds}. " * 8
    prompts = [served.prompt(order, head=beginning) for order in ORDERS[:3]]
    last = {"recompute_ratio": 1.0} if "reuse" not in kinds[1] else kinds[1]
    got = served.ask_each([(prompts[0], kinds[0]), (prompts[1], last), (prompts[2], last)])
    assert served.llm.reset_prefix_cache()
    assert [answer for answer, _ in got[1:]] == [served.ask([ids], reuse=False)[0][0] for ids in prompts[1:]]
    assert not any(reason for _, report in got[1:] for reason in report["fallbacks"] if reason != "not wanted")


def test_64_requests_some_of_them_aborted(served: Served) -> None:
    """Each answers as it does alone; the aborted ones disturb nobody, whatever they were about to do."""
    kinds: list[dict[str, Any]] = [{}, {"reuse": False}, {"method": "naive"}, {"recompute_ratio": 0.5}]
    jobs = [(served.prompt(order), kind) for order in ORDERS for kind in kinds]
    alone = [served.ask([ids], **kind)[0][0] for ids, kind in jobs]
    engine, chance = served.llm.llm_engine, random.Random(1)
    numbers = [chance.randrange(len(jobs)) for _ in range(64)]
    aborted = {f"many-{k}" for k in chance.sample(range(64), 12)}
    for k, number in enumerate(numbers):
        ids, kind = jobs[number]
        engine.add_request(f"many-{k}", {"prompt_token_ids": ids}, asking(kind, max_tokens=12))
    answers: dict[str, list[int]] = {}
    steps = 0
    while engine.has_unfinished_requests():
        if steps in (0, 1, 2, 5):  # before they are planned, loaded and filled, and while they decode
            engine.abort_request([name for name in sorted(aborted)[steps % 4 :: 4]])
        for output in engine.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
    finished = {name: answer for name, answer in answers.items() if len(answer) == 12}
    assert set(finished) >= {f"many-{k}" for k in range(64)} - aborted
    for k, number in enumerate(numbers):
        if (name := f"many-{k}") in finished:
            assert finished[name] == alone[number]


def test_nothing_is_left_of_finished_requests(served: Served) -> None:
    """Neither the planner nor the worker keeps what belonged to requests that have ended or were aborted."""
    prompts = [served.prompt(order) for order in ORDERS]
    served.ask(prompts)
    engine = served.llm.llm_engine
    for k, ids in enumerate(prompts):
        engine.add_request(f"gone-{k}", {"prompt_token_ids": ids}, asking({}, max_tokens=12))
    engine.abort_request([f"gone-{k}" for k in range(5)])
    served.ask(prompts)
    served.ask(prompts[:1], reuse=False)  # workers are told of the last ones with the next step
    scheduler, worker = served.connectors()
    held = {**scheduler.held(), **worker.held()}
    assert not any(held.values()), held


def test_a_beginning_is_computed_once(served: Served) -> None:
    """Without a whole block that vLLM's own cache could share, and for who may share one only."""
    head = "Say it shortly. "
    prompts = [served.prompt(PASSAGES[k:], head=head) for k in range(3)]
    begins = next(row for row, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    assert begins < served.block and served.llm.reset_prefix_cache()
    reports = [served.ask([ids])[0][1]["tokens"] for ids in prompts]
    assert [tokens.get("prefix", 0) for tokens in reports[1:]] == [begins] * 2
    assert reports[0].get("prefix", 0) < begins
    answers = [served.ask([ids], recompute_ratio=1.0)[0][0] for ids in prompts]
    assert answers == [served.ask([ids], reuse=False)[0][0] for ids in prompts]
    request = {"prompt_token_ids": prompts[0], "cache_salt": "of my own"}
    [salted] = served.llm.generate([request], asking({}, max_tokens=2), use_tqdm=False)
    assert "prefix" not in salted.kv_transfer_params["cacheclip"]["tokens"]


def test_an_answer_of_one_token_has_a_report(served: Served) -> None:
    """The request ends in the very step that filled its blocks."""
    ids = served.prompt(PASSAGES)
    reports = []
    for tokens in (1, 2):
        assert served.llm.reset_prefix_cache()
        reports.append(served.ask([ids], tokens)[0][1])
    one, more = reports
    assert one["pass"].pop("seconds") and more["pass"].pop("seconds")
    assert one == more and one["tokens"]["recomputed"]
    many = served.ask([ids, *(served.prompt(order) for order in ORDERS)], 1)
    assert all(sum(report["tokens"].values()) == report["prompt_tokens"] for _, report in many)
    assert served.ask([ids], 1, reuse=False)[0][1] == {"fallbacks": ["not wanted"]}
    served.llm.llm_engine.step()
    assert not any(served.connectors()[0].held().values())
