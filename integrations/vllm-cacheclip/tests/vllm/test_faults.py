"""What goes wrong costs time, never an answer: the request is vLLM's, and the report says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving import PASSAGES, Served, asking, save_tiny

from cacheclip_rag.store import Place

PROMPT = ["A passage that this file adds, so that no other test misses it when it is forgotten or damaged here. " * 2]


@pytest.fixture
def chunks(served: Served) -> list[str]:
    served.encode(PROMPT)
    return [*PASSAGES[:3], *PROMPT]


def plain(served: Served, ids: list[int]) -> list[int]:
    return served.ask([ids], reuse=False)[0][0]


def files(served: Served) -> set[Path]:
    return set(served.store.rglob("*.safetensors"))


def test_forgotten_chunks_are_not_used(served: Served, chunks: list[str]) -> None:
    """Forgotten by another process, between two requests of this one."""
    ids = served.prompt(chunks[::-1])
    [(_, before)] = served.ask([ids])
    place = Place(served.store, 0, 1 << 40)
    place.forget_everywhere({place.documents.text(PROMPT[0])})
    [(answer, report)] = served.ask([ids], recompute_ratio=1.0)
    assert before["chunks"] == 4 and report["chunks"] == 3
    assert answer == plain(served, ids)


def test_damaged_chunks_are_computed(served: Served) -> None:
    had = files(served)
    served.encode(PROMPT)
    [file] = files(served) - had
    data = bytearray(file.read_bytes())
    data[-100:] = bytes(100)
    file.write_bytes(data)
    ids = served.prompt([*PASSAGES[:3], *PROMPT])
    [(answer, report)] = served.ask([ids], recompute_ratio=1.0)
    assert any("gone or damaged" in reason for reason in report["fallbacks"])
    assert answer == plain(served, ids)


@pytest.mark.parametrize("stage", ["place", "pass", "hook", "select"])
def test_failures_inside_reuse(served: Served, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    from cacheclip_vllm import batch, computer

    from cacheclip_rag.methods.recompute import carry
    from cacheclip_rag.methods.select import query_guided

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("on purpose")

    target = {
        "place": (computer.PagedWorkspace, "place"),
        "pass": (batch, "run_forward"),
        "hook": (carry.CarryOver, "__call__"),
        "select": (query_guided, "top_groups"),
    }[stage]
    prompts = [served.prompt(PASSAGES[k:] + PASSAGES[:k]) for k in range(4)]
    expected = [plain(served, ids) for ids in prompts]
    with monkeypatch.context() as patched:
        patched.setattr(*target, fail)
        got = served.ask(prompts)
    assert [answer for answer, _ in got] == expected
    assert all("on purpose" in report["fallbacks"][0] for _, report in got)
    assert [answer for answer, _ in served.ask(prompts, recompute_ratio=1.0)] == expected  # and it goes on


def test_one_failing_request_does_not_touch_the_others(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from cacheclip_rag.methods.select import random as selector

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("on purpose")

    prompts = [served.prompt(PASSAGES[k:] + PASSAGES[:k]) for k in range(4)]
    alone = [served.ask([ids])[0][0] for ids in prompts]
    monkeypatch.setattr(selector.Random, "select", fail)
    jobs = [(prompts[0], {"method": "random"}), *((ids, {}) for ids in prompts)]
    got = served.ask_each(jobs)
    assert "on purpose" in got[0][1]["fallbacks"][0] and got[0][0] == plain(served, prompts[0])
    assert [answer for answer, _ in got[1:]] == alone
    assert not any(report["fallbacks"] for _, report in got[1:])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "autoo"}, 'did you mean "auto"'),
        ({"method": "ape"}, "decoding is vLLM's"),
        ({"method": "droidspeak"}, "residual stream"),
        ({"method": "cachecraft"}, "residual stream"),
        ({"recompute_ratio": 2}, "from 0 (plain reuse) to 1"),
        ({"recompute_ratio": "0.2"}, "from 0 (plain reuse) to 1"),
        ({"ratio": 0.2}, "recompute_ratio"),
        ({"method": 7}, "method is a str"),
        ({"method": "epic:tokens=3"}, "not encoded as epic wants it"),
    ],
)
def test_bad_options_are_named_and_cost_nothing(served: Served, options: dict[str, Any], reason: str) -> None:
    ids = served.prompt(PASSAGES)
    [(answer, report)] = served.ask([ids], **options)
    expected = plain(served, ids)
    if "epic" in str(options):  # encoded as cacheblend's, so that it is served
        assert not report["fallbacks"]
        return
    assert reason in report["fallbacks"][0]
    assert answer == expected


def test_prompt_logprobs_are_left_to_vllm(served: Served) -> None:
    ids = served.prompt(PASSAGES)
    [(answer, report)] = served.ask_each([(ids, {})], prompt_logprobs=0)
    assert "prompt_logprobs" in report["fallbacks"][0] and answer == plain(served, ids)


def test_clients_can_neither_ingest_nor_name_a_tenant(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both need the proof that only the server's processes have."""
    from cacheclip_vllm import PROOF
    from cacheclip_vllm.encoding import encode_request

    text = "A passage that nobody has added, and that a forged request is to add to the server's chunks. " * 2
    monkeypatch.setenv(PROOF, "not the server's")
    ids, forged = encode_request(served.model, "auto", text)
    monkeypatch.undo()
    before = files(served)
    for proof in (forged["cacheclip"]["proof"], None, ""):
        options = {**forged["cacheclip"], "proof": proof}
        served.ask_each([(ids, options)], tokens=1)
        assert files(served) == before
    mine = served.prompt(PASSAGES)
    [(_, report)] = served.ask_each([(mine, {"tenant": "other"})])
    assert report["chunks"] == len(PASSAGES)  # of its own tenant, whatever it says


def test_tenants_do_not_see_each_others_chunks(served: Served) -> None:
    import os

    from cacheclip_vllm import PROOF

    ids = served.prompt(PASSAGES)
    [(answer, report)] = served.ask_each([(ids, {"tenant": "other", "proof": os.environ[PROOF]})])
    assert "no chunk in this prompt" in report["fallbacks"][0] and answer == plain(served, ids)
    served.encode(PASSAGES, tenant="other")
    [(_, report)] = served.ask_each([(ids, {"tenant": "other", "proof": os.environ[PROOF]})])
    assert report["chunks"] == len(PASSAGES)


def test_a_prompt_of_nothing_but_a_chunk(served: Served) -> None:
    """The last row is vLLM's, even if a chunk holds it."""
    ids = served.model.tokenise(PASSAGES[0] + "\n\n" + PASSAGES[1], plain=True).ids.tolist()
    [(answer, report)] = served.ask([ids], recompute_ratio=1.0)
    assert answer == plain(served, ids) and not report["fallbacks"]


def test_a_chunk_that_is_too_long_is_not_stored(served: Served) -> None:
    before = files(served)
    with pytest.raises(Exception, match=r"maximum|longer|max_model_len"):
        served.encode(["word " * 3000])
    assert files(served) == before


def test_a_fused_variant_is_chosen_and_its_context_forgotten(served: Served) -> None:
    """A chunk computed behind another one; `forget` of that one removes it."""
    texts = ["The first of two passages, which the second one was computed behind. " * 3, "The second of them. " * 9]
    served.encode(texts)
    served.encode(texts[1:], context=texts[:1])
    ids = served.prompt(texts)
    [(_, report)] = served.ask([ids])
    assert report["fit"] > 0.9
    place = Place(served.store, 0, 1 << 40)
    place.forget_everywhere({place.documents.text(texts[0].strip())})
    [(_, report)] = served.ask([served.prompt([PASSAGES[0], texts[1]])])
    assert report["fit"] == 0.0 and report["chunks"] == 2


def test_a_prompt_beyond_a_pass_is_left_to_vllm(folder: Path) -> None:
    """Said in test_settings' process of its own: too many rows for one pass, with the option to raise."""
    from setting import in_another_process

    result = in_another_process(max_num_batched_tokens=512, long_prefill_token_threshold=0)
    assert all("--max-num-batched-tokens" in reason for reason in result["fallbacks"])
    assert all(result["whole"]) and all(result["together"])


def test_another_model_does_not_read_the_store(served: Served, tmp_path: Path) -> None:
    """Its weights are part of the namespace."""
    from cacheclip_vllm.served import weights_digest

    assert weights_digest(save_tiny(tmp_path / "a", seed=1)) != weights_digest(save_tiny(tmp_path / "b", seed=2))


def test_sampling_options_stay_vllms(served: Served) -> None:
    """A seeded sample over filled blocks equals itself, alone and among others."""
    ids = served.prompt(PASSAGES)
    params = asking({}, max_tokens=8)
    params.temperature, params.seed = 0.8, 7
    one = served.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    many = served.llm.generate([{"prompt_token_ids": ids}] * 4, [params] * 4, use_tqdm=False)
    assert {tuple(output.outputs[0].token_ids) for output in many} == {tuple(one[0].outputs[0].token_ids)}


def test_a_chunk_that_looks_like_the_template_does_not_reach_into_it(served: Served, folder: Path) -> None:
    """The prefix's KV is kept for all that follows, so nothing approximate may come into it."""
    text = served.model.shared_prefix() + "A passage that begins as the template does, and says little else. " * 2
    served.encode([text])
    prompts = [served.prompt([text[len(served.model.shared_prefix()) :], *PASSAGES[k:]]) for k in range(3)]
    expected = [plain(served, ids) for ids in prompts]
    assert [answer for answer, _ in served.ask(prompts, recompute_ratio=1.0)] == expected
    place = Place(served.store, 0, 1 << 40)
    place.forget_everywhere({place.documents.text(text.strip())})


def test_requests_aborted_before_a_step_leave_nothing(served: Served) -> None:
    engine = served.llm.llm_engine
    engine.add_request("early", {"prompt_token_ids": served.prompt(PASSAGES)}, asking({}, max_tokens=4))
    engine.abort_request(["early"])
    served.ask([served.prompt(PASSAGES)], reuse=False)
    scheduler, worker = served.connectors()
    assert not any({**scheduler.held(), **worker.held()}.values())


def test_errors_of_the_store_do_not_end_the_scheduler(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from cacheclip_vllm.planner import Known

    def fail(*args: Any) -> None:
        raise OSError("the folder is away")

    ids = served.prompt(PASSAGES)
    with monkeypatch.context() as patched:
        patched.setattr(Known, "follow", fail)
        [(answer, report)] = served.ask([ids])
    assert "the folder is away" in report["fallbacks"][0] and answer == plain(served, ids)


def test_a_failure_is_that_of_all_who_share_the_blocks(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests of one step with a new beginning: the first should have filled the second one's blocks."""
    from cacheclip_vllm import filling

    work = filling._Work.run

    def fail_once(self: Any, ask: Any) -> Any:
        if failing:
            failing.pop()
            raise RuntimeError("on purpose")
        return work(self, ask)

    failing = [True]
    beginning = "A beginning that no prompt has had so far. " * 8
    prompts = [served.prompt(order, head=beginning) for order in (PASSAGES, PASSAGES[::-1])]
    monkeypatch.setattr(filling._Work, "run", fail_once)
    got = served.ask(prompts, recompute_ratio=1.0)
    monkeypatch.undo()
    assert [answer for answer, _ in got] == [plain(served, ids) for ids in prompts]
