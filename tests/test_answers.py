"""An answer: its stream, its end, its sampling, and that many callers get what each would alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import PASSAGES, QUESTION, prompt_of

from cacheclip_rag import ConfigurationError


def test_a_stream_gives_the_answer_piece_by_piece(engine):
    prompt = prompt_of(engine, PASSAGES)
    answer = engine.generate(prompt, max_new_tokens=20)
    stream = engine.stream(prompt, max_new_tokens=20)
    assert "".join(stream) == answer.text and tuple(stream.ids) == answer.ids
    assert stream.report.completion_tokens == len(answer.ids) and stream.report.ttft > 0


def test_closing_or_cancelling_a_stream_ends_the_request(engine):
    prompt = prompt_of(engine, PASSAGES)
    with engine.stream(prompt, max_new_tokens=500, eos_token_id=-1) as stream:
        next(stream)
    assert stream.report.finish_reason == "cancelled" and engine.limit.in_flight == 0
    cancel = threading.Event()
    cancel.set()
    stream = engine.stream(prompt, cancel=cancel)
    assert list(stream) == [] and stream.report.finish_reason == "cancelled"
    assert stream.report.prompt_tokens == 0, "nothing was computed for a request nobody waits for"
    with pytest.raises(ConfigurationError, match="temperature above 0"):
        engine.stream(prompt, do_sample=True, temperature=0.0)
    cancel = threading.Event()
    stream = engine.stream(prompt, max_new_tokens=500, eos_token_id=-1, cancel=cancel)
    next(stream)
    cancel.set()
    list(stream)
    assert stream.report.finish_reason == "cancelled" and stream.report.completion_tokens < 20


def test_an_interrupt_during_generation_leaves_the_engine_working(engine, monkeypatch):
    prompt = prompt_of(engine, PASSAGES)
    expected = engine.generate(prompt, max_new_tokens=6).ids
    computer, calls = engine.backbone.computer, []
    forward = computer.forward_one

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # two of the prefill, and the first step
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(computer, "forward_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompt, max_new_tokens=6)
    monkeypatch.undo()
    assert engine.generate(prompt, max_new_tokens=6).ids == expected and engine.limit.in_flight == 0


def test_a_call_inside_a_stream_does_not_wait_for_it(engine):
    prompt = prompt_of(engine, PASSAGES)
    outer = engine.stream(prompt, max_new_tokens=5, eos_token_id=-1)
    inner = [engine.generate("hello", max_new_tokens=2).ids for _ in outer]
    assert inner and all(ids == inner[0] for ids in inner)


def test_many_callers_get_the_answers_of_one_after_another(engine):
    prompts = [prompt_of(engine, PASSAGES[i % 5 :] + PASSAGES[: i % 5], f"{QUESTION} {i}") for i in range(12)]
    alone = [engine.generate(p, max_new_tokens=5).ids for p in prompts]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda p: engine.generate(p, max_new_tokens=5).ids, prompts))
    assert together == alone


def test_sampling_is_transformers_own(engine):
    prompt = prompt_of(engine, PASSAGES)
    torch.manual_seed(3)
    one = engine.generate(prompt, temperature=1.5, max_new_tokens=8).ids
    torch.manual_seed(3)
    assert engine.generate(prompt, temperature=1.5, max_new_tokens=8).ids == one
    assert (
        engine.generate(prompt, temperature=0.0, max_new_tokens=8).ids == engine.generate(prompt, max_new_tokens=8).ids
    )
    with pytest.raises(ConfigurationError, match="no_such_option"):
        engine.generate(prompt, no_such_option=1)


def test_stop_strings_end_the_answer_and_are_not_part_of_it(engine):
    prompt = prompt_of(engine, PASSAGES)
    text = engine.generate(prompt, max_new_tokens=30, eos_token_id=-1).text
    stop = text[10:13]
    answer = engine.generate(prompt, max_new_tokens=30, eos_token_id=-1, stop=[stop])
    assert answer.text == text[: text.index(stop)] and answer.report.finish_reason == "stop"


def test_what_the_models_own_config_says_of_other_loops_does_not_matter(engine):
    prompt = prompt_of(engine, PASSAGES)
    expected = engine.generate(prompt, max_new_tokens=8).ids
    engine.backbone.model.generation_config.update(num_beams=3, num_return_sequences=2, stop_strings=["a"])
    assert engine.generate(prompt, max_new_tokens=8).ids == expected
    assert engine.generate(prompt, max_new_tokens=8, do_sample=None).ids == expected
    torch.manual_seed(0)
    sampled = engine.generate(prompt, max_new_tokens=8, do_sample=None, temperature=5.0).ids
    torch.manual_seed(0)
    assert sampled == engine.generate(prompt, max_new_tokens=8, temperature=5.0).ids != expected


def test_a_control_token_may_end_an_answer(engine, monkeypatch):
    script = iter([65, 256, 66, 257])
    monkeypatch.setattr(
        engine.backbone, "generate", lambda *_, eos_token_id=(257,), **__: ended(script, set(eos_token_id))
    )

    def ended(tokens, ends):
        for token in tokens:
            yield token
            if token in ends:
                return

    answer = engine.generate(prompt_of(engine, PASSAGES), stop=["<|im_end|>", "never"])
    assert answer.ids == (65, 256) and answer.report.finish_reason == "stop"


def test_an_answer_that_ends_with_its_last_allowed_token_has_stopped(engine):
    prompt = prompt_of(engine, PASSAGES)
    ids = engine.generate(prompt, max_new_tokens=8, eos_token_id=-1).ids
    place = next(n for n in range(1, 8) if ids[n] not in ids[:n])

    def reason(most: int) -> str:
        return engine.generate(prompt, max_new_tokens=most, eos_token_id=[ids[place]]).report.finish_reason

    assert [reason(most) for most in (place, place + 1, place + 2)] == ["length", "stop", "stop"]


def test_generation_ends_at_the_window(engine):
    answer = engine.generate("x" * 4090, max_new_tokens=100, eos_token_id=-1)
    assert len(answer.ids) == 6 and answer.report.finish_reason == "length"


@pytest.mark.parametrize("method", ["query_guided", "full", "prefix-cache", "cachecraft"])
def test_a_limit_far_beyond_the_window_costs_no_memory_beyond_it(engine, method):
    prompt = prompt_of(engine, PASSAGES)
    engine.generate(prompt, method=method, max_new_tokens=1)  # Cache-Craft keeps what this one leaves
    few = engine.generate(prompt, method=method, max_new_tokens=4096, stop=[""]).report
    many = engine.generate(prompt, method=method, max_new_tokens=2_000_000, stop=[""]).report
    assert many.canvas_bytes == few.canvas_bytes
