"""A request's options are checked before anything is planned, and a plan is the prompt as methods see it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from cacheclip_vllm.plan import Encode, Options, Place, Plan, needs_every_key, options, refused

from cacheclip_rag import methods
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.methods import METHODS, resolve

AUTO = methods.resolve("auto")
REFUSED = {
    "full": '"reuse": false',
    "prefix-cache": "prefix cache of its own",
    "ragcache": "prefix cache of its own",
    "droidspeak": "residual stream",
    "cachecraft": "residual stream",
    "cacheclip": "auxiliary model",
    "ape": "decoding is vLLM's",
    "sel": "decoding is vLLM's",
    "psr": "decoding is vLLM's",
    "kvlink": "soft tokens",
    "kvpacket": "soft tokens",
    "infoflow:reorder=True": "reordering",
}
"""What the reason says. All other methods of the table can be used."""


# ---- options ---------------------------------------------------------------------------------------------------------


def test_a_request_that_says_nothing_gets_the_default_method_and_its_ratio() -> None:
    for given in (None, {}):
        assert options(given, AUTO) == Options(AUTO, AUTO.recompute_ratio)


def test_options_are_taken_over() -> None:
    given = {
        "method": "cacheblend",
        "recompute_ratio": 0.3,
        "reuse": False,
        "report": True,
        "tenant": "t",
        "encode": {},
    }
    got = options(given, AUTO)
    assert (got.method.name, got.ratio, got.reuse, got.tenant, got.encode) == (
        "cacheblend",
        0.3,
        False,
        "t",
        {},
    )


@pytest.mark.parametrize("ratio", [0, 0.0, 0.5, 1, 1.0])
def test_a_ratio_that_a_request_names_is_kept_however_well_contexts_fit(ratio: float) -> None:
    assert AUTO.fitted_ratio is not None
    for given in ({"recompute_ratio": ratio}, {"recompute_ratio": ratio, "method": "auto"}):
        got = options(given, AUTO)
        assert got.method.ratio(got.ratio, 1.0) == got.method.ratio(got.ratio, 0.0) == ratio
    assert options({}, AUTO).method.fitted_ratio == AUTO.fitted_ratio


def test_a_method_string_changes_parameters() -> None:
    assert options({"method": "query_guided:group_size=3"}, AUTO).method.select.group_size == 3  # type: ignore[attr-defined]
    assert options({"method": "epic"}, AUTO).ratio == METHODS["epic"].recompute_ratio


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ("auto", '{"recompute_ratio": 0.2}'),
        (["auto"], '{"recompute_ratio": 0.2}'),
        (0.2, '{"recompute_ratio": 0.2}'),
        ({"ratio": 0.2}, "method, recompute_ratio, reuse, report"),
        ({"": 1}, "method, recompute_ratio, reuse, report"),
        ({"method": "atuo"}, 'did you mean "auto"'),
        ({"method": "?"}, "Known: full"),
        ({"method": ""}, "Known: full"),
        ({"method": "auto:nothing=1"}, "carry"),
        ({"method": "auto:carry"}, "="),
        ({"method": None}, "method is a str"),
        ({"method": ["auto"]}, "method is a str"),
        ({"recompute_ratio": 1.1}, "from 0 (plain reuse) to 1 (full prefill)"),
        ({"recompute_ratio": -0.1}, "from 0 (plain reuse) to 1 (full prefill)"),
        ({"recompute_ratio": float("nan")}, "from 0 (plain reuse) to 1 (full prefill)"),
        ({"recompute_ratio": "0.2"}, "must be a number"),
        ({"recompute_ratio": None}, "must be a number"),
        ({"recompute_ratio": True}, "must be a number"),
        ({"reuse": "no"}, "reuse is a bool"),
        ({"reuse": 0}, "reuse is a bool"),
        ({"report": 1}, "report is a bool"),
        ({"tenant": 7}, "tenant is a str"),
        ({"tenant": None}, "tenant is a str"),
    ],
)
def test_a_bad_option_is_refused_with_what_is_valid(given: Any, fix: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        options(given, AUTO)
    assert fix in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_vllm_cannot_run_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        options({"method": name}, AUTO)
    assert f'"{name.split(":")[0]}"' in str(caught.value) and REFUSED[name] in str(caught.value)


def test_an_adapter_is_refused_since_the_weights_are_the_servers() -> None:
    assert "merged into" in str(refused(resolve("blockattention:adapter=folder")))


def test_an_auxiliary_model_is_asked_where_there_is_one() -> None:
    assert options({"method": "cacheclip"}, AUTO, auxiliary=True).method.select.needs_auxiliary
    with pytest.raises(ConfigurationError, match="--auxiliary"):
        options({"method": "cacheclip"}, AUTO)


def test_all_other_methods_of_the_table_are_accepted() -> None:
    for name, method in METHODS.items():
        assert (refused(method) is not None) == (name in REFUSED), name


def test_methods_whose_softmax_is_over_the_row_look_at_keys_outside_chunks() -> None:
    assert [name for name, method in METHODS.items() if refused(method) is None and needs_every_key(method)] == [
        "query_guided",
        "infoflow",
    ]


# ---- plans -----------------------------------------------------------------------------------------------------------


def plan(places: list[Place], question: range = range(35, 38), ratio: float = 0.2, **more: Any) -> Plan:
    """A prompt of 40 tokens."""
    return Plan(
        request="r",
        ids=np.arange(100, 140),
        tenant="",
        method=AUTO,
        ratio=ratio,
        prefix=0,
        places=places,
        question=np.arange(question.start, question.stop),
        question_ids=np.arange(3),
        **more,
    )


FOUND = Place("a", "ka", ((5, 0, 8),))
CUT = Place("b", "kb", ((15, 2, 4), (21, 8, 3)))
"""Two tokens in between are other ones."""
GONE = Place("c", None, ((26, 1, 5),), missing="gone")


def test_a_layout_says_for_each_row_which_chunks_token_it_holds() -> None:
    layout = plan([FOUND, CUT, GONE]).layout()
    assert layout.ids.tolist() == list(range(100, 140))
    assert [(span.start, span.end, span.key) for span in layout.spans] == [(5, 13, "ka"), (15, 24, "kb"), (26, 31, "")]
    held = (
        {5 + n: (0, n) for n in range(8)}
        | {15 + n: (1, 2 + n) for n in range(4)}
        | {21 + n: (1, 8 + n) for n in range(3)}
    )
    for row in range(40):
        assert (int(layout.chunk[row]), int(layout.token[row])) == held.get(row, (-1, -1))
    assert layout.edge.nonzero()[:, 0].tolist() == [19, 20]
    assert layout.runs() == [(0, 5, slice(0, 8)), (1, 15, slice(2, 6)), (1, 21, slice(8, 11))]


def test_a_layout_without_chunks_holds_nothing() -> None:
    layout = plan([]).layout()
    assert len(layout) == 40 and not layout.reusable.any() and not layout.edge.any() and layout.spans == ()


def test_spans_are_rows() -> None:
    """Selectors that go by characters see one character a token."""
    layout = plan([FOUND]).layout()
    assert torch.equal(layout.offsets[:, 0], torch.arange(40)) and torch.equal(
        layout.offsets[:, 1], torch.arange(1, 41)
    )


@pytest.mark.parametrize(
    ("places", "ratio", "rows"),
    [
        ([], 0.2, 40),
        ([FOUND], 0.0, 32),
        ([FOUND], 1.0, 40),
        ([FOUND, CUT], 0.0, 25),
        ([FOUND, CUT], 0.2, 25 + 3),
        ([FOUND, CUT, GONE], 0.0, 25),
        ([GONE], 0.5, 40),
    ],
)
def test_the_cost_is_what_no_chunk_holds_and_the_share_that_is_recomputed(
    places: list[Place], ratio: float, rows: int
) -> None:
    assert plan(places, ratio=ratio).cost == rows


def test_a_question_in_front_of_a_chunk_is_copied_behind_the_prompt() -> None:
    places = [FOUND, CUT]
    assert not plan(places, range(24, 28)).copies_question
    assert plan(places, range(1, 4)).copies_question
    assert plan(places, range(13, 15)).copies_question  # between the chunks
    assert plan(places, range(0)).copies_question  # nothing is asked: selection sees the end of the prompt
    assert not plan([dataclasses.replace(CUT, key=None)], range(1, 4)).copies_question
    assert not plan(places, range(0), encode=Encode("c", 24)).copies_question


def test_the_workers_load_each_key_once_and_know_what_it_saves() -> None:
    """A context is loaded however long it takes: the chunk behind it is to be computed with all of it."""
    assert plan([FOUND, CUT, GONE, FOUND]).keys == {"ka": 16, "kb": 7}
    assert plan([FOUND, CUT], encode=Encode("c", 24)).keys == {"ka": None, "kb": None}
