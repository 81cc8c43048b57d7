"""Prompt lookup: drafts from the prompt and the answer change how many forwards an answer takes, and not the answer."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny import CONFIGS, PASSAGES, prompt_of, tiny_backbone, two_layers

from cacheclip_rag import ConfigurationError, Engine
from cacheclip_rag.frameworks.structured.grammar import json_grammar
from cacheclip_rag.prefill import answering
from cacheclip_rag.serving.lookup import LEAST, Lookup, draft

REPEATED = "Once more: the lighthouse, the harbour, the railway. " * 3


@pytest.fixture(scope="module", params=list(CONFIGS))
def engines(request: pytest.FixtureRequest) -> tuple[Engine, Engine]:
    """Without drafts, and with; both know `PASSAGES`."""
    backbone = tiny_backbone(request.param)
    return tuple(_engine(backbone, most) for most in (0, 10))  # type: ignore[return-value]


def _engine(backbone: Any, most: int) -> Engine:
    engine = Engine(backbone, method="query_guided", recompute_ratio=0.2, prompt_lookup=most)
    engine.ensure(PASSAGES)
    return engine


def prompts(engine: Engine) -> list[str]:
    return [prompt_of(engine, PASSAGES[:3]), prompt_of(engine, PASSAGES[2:], REPEATED), "ab" * 40]


# ---- what is drafted ----------------------------------------------------------------------------------------------


def by_hand(ids: list[int], most: int) -> list[int]:
    """The longest suffix of at most 12 tokens, its latest occurrence."""
    for size in range(min(12, len(ids) - 1), LEAST - 1, -1):
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start : start + size] == ids[-size:]:
                return ids[start + size : start + size + most]
    return []


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 8))
def test_what_followed_the_latest_occurrence_of_the_longest_suffix(ids: list[int], most: int) -> None:
    expected = by_hand(ids, most) if most else []
    assert draft(np.array(ids, np.int64), most).tolist() == expected


def test_nothing_is_drafted_where_nothing_repeats() -> None:
    assert len(draft(np.arange(1000), 10)) == 0


# ---- the same answers ---------------------------------------------------------------------------------------------


def test_greedy_answers_are_the_same_token_for_token(engines: tuple[Engine, Engine]) -> None:
    plain, looking = engines
    came = 0
    for prompt in prompts(plain):
        for options in ({}, {"method": "naive"}, {"method": "full"}, {"repetition_penalty": 1.3}):
            expected = plain.generate(prompt, max_new_tokens=40, **options)
            answer = looking.generate(prompt, max_new_tokens=40, **options)
            assert answer.ids == expected.ids and answer.text == expected.text
            assert answer.report.finish_reason == expected.report.finish_reason
            assert expected.report.drafted == expected.report.looked_up == 0
            came += answer.report.looked_up
    assert came or plain.backbone.config.model_type == "mistral", "no draft was accepted: nothing was tested"


def test_sampled_answers_are_the_same_with_the_same_seed(engines: tuple[Engine, Engine]) -> None:
    plain, looking = engines
    for seed in range(4):
        for prompt in prompts(plain):
            options: dict[str, Any] = {"temperature": 0.3, "top_p": 0.9, "seed": seed, "max_new_tokens": 25}
            assert looking.generate(prompt, **options).ids == plain.generate(prompt, **options).ids


@pytest.mark.parametrize("method", ["ape", "sel", "psr", "auto", "epic", "prefix-cache"])
def test_methods_that_change_attention_while_decoding_draft_as_well(method: str) -> None:
    backbone = tiny_backbone()
    answers = []
    for most in (0, 10):
        engine = Engine(backbone, method=method, prompt_lookup=most)
        engine.ensure(PASSAGES)
        answers.append(engine.generate(prompt_of(engine, PASSAGES[:3], REPEATED), max_new_tokens=60))
    assert answers[0].ids == answers[1].ids


class Drafting(Lookup):
    """Drafts of a test's own, in place of what stands in the prompt."""

    tokens: ClassVar[list[int]] = []
    """The whole answer that is drafted."""
    start = 0

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def propose(self, ids: NDArray[np.int64], most: int) -> NDArray[np.int64]:
        return np.array(self.tokens[len(ids) - self.start :][: min(most, 10)], np.int64)


def drafting(monkeypatch: pytest.MonkeyPatch, engine: Engine, prompt: str, tokens: list[int]) -> int:
    """The forwards that this answer takes if ``tokens`` are drafted; asserts that it is the same answer."""
    expected = engine.generate(prompt, max_new_tokens=32)
    Drafting.tokens, Drafting.start = tokens, expected.report.prompt_tokens
    before = engine.answering.steps.passes
    with monkeypatch.context() as patch:
        patch.setattr(answering, "_Drafts", Drafting)
        assert engine.generate(prompt, max_new_tokens=32).ids == expected.ids
    return engine.answering.steps.passes - before


def test_right_drafts_save_forwards_and_wrong_ones_save_none(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_backbone(), method="query_guided", prompt_lookup=0)
    prompt = prompt_of(engine, PASSAGES[:2])
    right = list(engine.generate(prompt, max_new_tokens=32).ids)
    assert len(right) == 32
    assert drafting(monkeypatch, engine, prompt, right) == 3  # 31 tokens behind the first: 11, 11, 9
    wrong = [(token + 1) % 256 for token in right]
    assert drafting(monkeypatch, engine, prompt, wrong) == 31
    half = [token if place % 4 else (token + 1) % 256 for place, token in enumerate(right)]
    assert drafting(monkeypatch, engine, prompt, half) == 8


def test_the_end_of_the_answer_inside_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_backbone(), method="query_guided", prompt_lookup=0)
    prompt = prompt_of(engine, PASSAGES[:2])
    right = list(engine.generate(prompt, max_new_tokens=32).ids)
    Drafting.tokens, Drafting.start = right, len(engine.backbone.tokenise_prompt(prompt).ids)
    ends = sorted({right.index(token) for token in right if right.index(token) > 3})[:3]
    expected = {
        **{("eos", at): engine.generate(prompt, max_new_tokens=32, eos_token_id=right[at]).ids for at in ends},
        **{("length", n): engine.generate(prompt, max_new_tokens=n).ids for n in (1, 2, 7, 12)},
    }
    stop = engine.backbone.tokenizer.decode(right[5:8])
    text = engine.generate(prompt, max_new_tokens=32, stop=[stop]).text
    monkeypatch.setattr(answering, "_Drafts", Drafting)
    for (kind, value), ids in expected.items():
        option = {"eos_token_id": right[value], "max_new_tokens": 32} if kind == "eos" else {"max_new_tokens": value}
        assert engine.generate(prompt, **option).ids == ids
    assert engine.generate(prompt, max_new_tokens=32, stop=[stop]).text == text


def test_the_end_of_the_context_inside_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = two_layers(window=300)
    engine = Engine(backbone, method="query_guided", prompt_lookup=0)
    prompt = "ab" * 142
    expected = engine.generate(prompt, max_new_tokens=100)
    assert len(expected.ids) == 16 and expected.report.finish_reason == "length"
    Drafting.tokens, Drafting.start = [*expected.ids, *range(50)], 284
    monkeypatch.setattr(answering, "_Drafts", Drafting)
    assert engine.generate(prompt, max_new_tokens=100).ids == expected.ids


def test_structured_output_is_the_same() -> None:
    from cacheclip_rag.frameworks.structured.guide import Guide

    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"enum": ["xyxyxy", "zz"]}}}}
    backbone = two_layers()
    answers = []
    for most in (0, 10):
        engine = Engine(backbone, method="query_guided", prompt_lookup=most)
        guide = Guide(backbone, json_grammar(schema), 60)
        prompt = 'Say {"a": ["xyxyxy", "xyxyxy", "zz"]}'
        answers.append(engine.generate(prompt, max_new_tokens=60, **guide.options()).ids)
    assert answers[0] == answers[1]


# ---- when it pays -------------------------------------------------------------------------------------------------


def propose(lookup: Lookup, rounds: int, right: bool, cost: float) -> int:
    """Drafted tokens over so many passes, if each draft is ``right`` or not, at ``cost`` of a pass for each row."""
    text, total = [1, 2, 3, 1, 2], 0
    for _ in range(rounds):
        found = len(lookup.propose(np.array(text), 10))
        lookup.took(1.0 + cost * found, found)
        lookup.note(found, found if right else 0)
        text += [1, 2, 3, 1, 2]
        total += found
    return total


def test_a_draft_that_never_comes_true_is_given_up_and_tried_again_now_and_then() -> None:
    lookup = Lookup()
    first, later = (propose(lookup, 40, False, 0.1) for _ in range(2))
    assert 0 < later <= first < 40


def test_right_drafts_grow_to_the_longest_and_costly_rows_shorten_them() -> None:
    cheap, dear = Lookup(), Lookup()
    assert propose(cheap, 60, True, 0.0) > 4 * 60
    assert propose(dear, 60, True, 1.5) < propose(Lookup(), 60, True, 0.1)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="prompt_lookup"):
        Engine(tiny_backbone(), method="query_guided", prompt_lookup=-1)


def test_the_report_counts_what_was_drafted_and_what_came_true(engines: tuple[Engine, Engine]) -> None:
    answer = engines[1].generate("ab" * 60, max_new_tokens=60)
    report = answer.report
    assert 0 <= report.looked_up <= report.drafted and report.looked_up < report.completion_tokens
    assert report.as_dict()["looked_up"] == report.looked_up
    assert engines[1].stats().looked_up >= report.looked_up


def test_what_a_wrong_draft_left_behind_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_backbone(), method="query_guided", prompt_lookup=0)
    prefill = engine.prefill(prompt_of(engine, PASSAGES[:2]), room=20)
    row = len(prefill.layout)
    expected = prefill.step(torch.tensor([65]), row)
    prefill.step(torch.tensor([65, 1, 2, 3, 4]), row)
    assert torch.allclose(prefill.step(torch.tensor([65]), row), expected, atol=1e-4)
    assert prefill.canvas is not None and prefill.canvas.length == row + 1


def with_right_drafts(monkeypatch: pytest.MonkeyPatch, engine: Engine, prompt: str) -> tuple[list[int], list[Drafting]]:
    """The answer's 32 tokens, which are drafted from now on, and the drafts of each request to come."""
    right = list(engine.generate(prompt, max_new_tokens=32).ids)
    Drafting.tokens, Drafting.start = right, len(engine.backbone.tokenise_prompt(prompt).ids)
    made: list[Drafting] = []
    monkeypatch.setattr(answering, "_Drafts", lambda *_: made.append(Drafting()) or made[-1])
    return right, made


def test_an_answer_that_ends_inside_a_draft_counts_what_came_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_backbone(), method="query_guided", prompt_lookup=0)
    prompt = prompt_of(engine, PASSAGES[:2])
    right, made = with_right_drafts(monkeypatch, engine, prompt)
    end = next(at for at in range(4, 9) if right[at] not in right[:at])
    answer = engine.generate(prompt, max_new_tokens=32, eos_token_id=right[end])
    assert len(answer.ids) == end + 1 and (made[0].drafted, made[0].accepted) == (10, end)


@pytest.mark.parametrize("how", ["stop string", "cancel", "closed stream"])
def test_an_answer_that_is_ended_inside_a_draft_counts_what_came_of_it(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny_backbone(), method="query_guided", prompt_lookup=0)
    prompt = prompt_of(engine, PASSAGES[:2])
    right, made = with_right_drafts(monkeypatch, engine, prompt)
    told: list[tuple[int, int]] = []
    engine.observers.append(lambda _: told.append((made[0].drafted, made[0].accepted)))
    cancel = threading.Event()
    stop = [engine.backbone.tokenizer.decode(right[4:7])] if how == "stop string" else None
    with engine.stream(prompt, max_new_tokens=32, stop=stop, cancel=cancel) as stream:
        for _ in stream:
            if len(stream.ids) >= 6 and how == "cancel":
                cancel.set()
            elif len(stream.ids) >= 6 and how == "closed stream":
                break
    assert 1 < len(stream.ids) <= 11
    assert told == [(10, len(stream.ids) - 1)], "as those see it who are told that the request is over"
