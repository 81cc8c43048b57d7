"""What no answer can be made with is refused, before any work, with words that say what to do."""

from __future__ import annotations

import pytest
import torch
from tiny import PASSAGES, prompt_of, tiny_backbone
from transformers import GenerationConfig

from cacheclip_rag import ConfigurationError, Engine, PromptError, StoreError
from cacheclip_rag.methods import resolve


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 2.5}, ConfigurationError, "max_new_tokens must be a whole number of at least 1"),
        ({"max_new_tokens": None}, ConfigurationError, "max_new_tokens must be a whole number"),
        ({"stop": 5}, ConfigurationError, "stop must be a string or several"),
        ({"temperature": -1}, ConfigurationError, "temperature must be a number of at least 0"),
        ({"top_k": -1, "do_sample": True}, ConfigurationError, "top_k must be"),
        ({"repetition_penalty": 0}, ConfigurationError, "repetition_penalty must be a number above 0"),
        ({"max_length": 50}, ConfigurationError, "give max_new_tokens"),
        ({"generation_config": GenerationConfig(num_beams=3)}, ConfigurationError, "as options, each by its name"),
        ({"inputs": torch.ones(1, 3)}, ConfigurationError, "the prompt is the first argument"),
        ({"num_beams": 3}, ConfigurationError, "one beam"),
        ({"prompt": [{"role": "user", "content": "Hello."}]}, PromptError, r"backbone\.chat\(messages\)"),
        ({"prompt": 5}, PromptError, "a prompt is text, not int"),
    ],
)
def test_what_no_answer_can_be_made_with_is_refused_before_the_prefill(engine, options, error, message):
    prompt = options.pop("prompt", prompt_of(engine, PASSAGES))
    with pytest.raises(error, match=message):
        engine.stream(prompt, **options)


@pytest.mark.parametrize(
    "option", [{"num_beams": 2}, {"num_return_sequences": 2}, {"penalty_alpha": 0.6}, {"stop_strings": ["a"]}]
)
def test_another_decoding_than_ours_is_refused_before_any_work(engine, option):
    with pytest.raises(ConfigurationError, match=next(iter(option))):
        engine.stream("Who?", **option)


def test_an_unknown_option_is_refused_before_any_work(engine):
    with pytest.raises(ConfigurationError, match=r'"max_tokens" .* did you mean "max_new_tokens"'):
        engine.stream("Who?", max_tokens=5)
    assert len(engine.generate("Who?", max_new_tokens=2, repetition_penalty=1.1).ids) <= 2


@pytest.mark.parametrize("call", ["ensure", "ensure_later", "forget"])
def test_one_text_is_not_taken_for_several(engine, call):
    with pytest.raises(ConfigurationError, match="several texts"):
        getattr(engine, call)(PASSAGES[0])
    assert engine.knows(PASSAGES[0])


def test_an_empty_prompt_is_refused_and_a_blank_one_answered(engine):
    with pytest.raises(PromptError, match="empty"):
        engine.generate("")
    assert engine.generate(" \n", max_new_tokens=2).report.prompt_tokens == 2


def test_a_prompt_beyond_the_window_is_refused_and_the_next_one_served(engine):
    with pytest.raises(PromptError, match="context length"):
        engine.generate("x" * 5000)
    assert engine.generate("hello", max_new_tokens=2).ids


def test_a_request_that_fails_says_so_in_its_report(engine):
    stream = engine.stream("x" * 5000)
    with pytest.raises(PromptError):
        next(stream)
    assert stream.report.finish_reason == "error"


def test_chunks_that_cannot_be_kept_are_listed_with_the_reason(engine):
    too_long, too_short, surrogate = "y" * 5000, "short", "\ud800" * 80
    result = engine.ensure([too_long, too_short, surrogate, *PASSAGES])
    assert len(result.keys) == len(PASSAGES) and result.encoded == 0
    reasons = [reason for _, reason in result.skipped]
    assert (
        "exceeds the model's limit" in reasons[0]
        and "short" not in reasons[0]
        and "64" in reasons[1]
        and "Unicode" in reasons[2]
    )


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan"), "0.2", True])
def test_ratios_outside_0_to_1_are_refused(engine, ratio):
    with pytest.raises(ConfigurationError, match="recompute_ratio"):
        engine.generate("hello", recompute_ratio=ratio)


def test_unknown_names_are_refused_with_the_valid_ones(engine):
    with pytest.raises(ConfigurationError, match="query_guided"):
        engine.generate("hello", method="queryguided")
    with pytest.raises(ConfigurationError, match="smollm2-135m-instruct"):
        Engine("smollm2-135m-instructt")
    with pytest.raises(ConfigurationError, match="group_size"):
        resolve("cacheclip", windw=3)
    with pytest.raises(ConfigurationError, match="max_new_tokens"):
        engine.generate("hello", max_new_tokens=0)


def test_a_method_without_its_auxiliary_model_is_refused_at_once(engine):
    with pytest.raises(ConfigurationError, match="auxiliary"):
        Engine(tiny_backbone(), method="cacheclip")
    with pytest.raises(ConfigurationError, match="auxiliary"):
        engine.generate("hello", method="cacheclip")


def test_a_store_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        Engine(tiny_backbone(), store=tmp_path / "file")
