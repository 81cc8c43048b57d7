"""Neighbours by similarity: who they are, what a fuser does with them, and what it does without an embedding."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from fused import FUSED, A, B, C, D, contexts, engine
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import ConfigurationError, Engine
from cacheclip_rag.corpus.neighbours import Neighbourhood, similar
from cacheclip_rag.frameworks.fuser import Fuser


def test_neighbours_are_the_most_similar_others_and_follow_the_corpus() -> None:
    vectors = {"a": [1.0, 0.0], "b": [2.0, 0.1], "c": [0.0, 1.0], "d": [0.7, 0.7]}  # length does not count
    known = Neighbourhood(2)
    known.add(list(vectors), list(vectors.values()))
    assert known.nearest(["a", "c"]) == {"a": ["b", "d"], "c": ["d", "b"]}
    known.add(["e"], [[0.05, 1.0]])
    assert known.nearest(["c", "unknown"]) == {"c": ["e", "d"]}
    known.remove(["d", "unknown"])
    assert known.nearest() == {"a": ["b", "e"], "b": ["a", "e"], "c": ["e", "b"], "e": ["c", "b"]}


def test_a_corpus_of_one_and_of_copies() -> None:
    assert similar(["a"], lambda texts: [[1.0]]) == {"a": []}
    calls: list[list[str]] = []

    def embed(texts: list[str]) -> np.ndarray:
        calls.append(texts)
        return np.eye(2)[: len(texts)]

    assert similar(["a", " a\n", "b"], embed) == {"a": ["b"], "b": ["a"]} and calls == [["a", "b"]]
    assert similar([], embed) == {}


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1.0]], "need embeddings"),
        ([1.0, 2.0], "need embeddings"),
        ([[1.0, 2.0, 3.0]] * 2, "width 3 among"),
        ([[1.0, float("nan")]] * 2, "finite"),
        ([[1.0], [1.0, 2.0]], "rows of numbers"),
        ("ab", "rows of numbers"),
    ],
)
def test_what_is_no_embedding_is_refused_and_changes_nothing(vectors: Any, message: str) -> None:
    known = Neighbourhood()
    known.add(["a", "b"], [[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ConfigurationError, match=message):
        known.add(["c", "d"], vectors)
    assert len(known) == 2
    with pytest.raises(ConfigurationError, match="at least 1"):
        Neighbourhood(0)


def test_embeddings_stay_the_caller_s() -> None:
    vectors = np.array([[3.0, 0.0], [0.0, 2.0]], dtype=np.float32)
    vectors.flags.writeable = False
    known = Neighbourhood(1)
    known.add(["a", "b"], vectors)
    again = np.array([[0.1, 5.0]], dtype=np.float32)
    before = again.copy()
    known.add(["c"], again)
    assert np.array_equal(again, before)
    again[:] = [9.0, 0.0]  # an embedding function may use its room again
    assert known.nearest(["c"]) == {"c": ["b"]}


def test_a_model_that_cannot_be_composed_is_not_fused_for() -> None:
    ready = Engine(tiny_backbone(), method=FUSED, on_uncomposable="prefill")
    ready.composable = False
    Fuser(1, lambda texts: 1 / 0)(ready)


def test_an_embedding_that_is_no_number_leaves_out_its_own_chunk_only(caplog: pytest.LogCaptureFixture) -> None:
    ready = engine()
    ready.ensure([A, B, C])
    numbers = {A: [1.0, 0.0], B: [1.0, 0.1], C: [float("nan"), 1.0]}
    fuser = Fuser(1, lambda texts: [numbers[text] for text in texts])
    with caplog.at_level("WARNING", "cacheclip_rag"):
        fuser(ready, show_progress=False)
    assert {text: contexts(ready, text) for text in (A, B, C)} == {A: [(), (B,)], B: [(), (A,)], C: [()]}
    assert "not made of finite numbers" in caplog.text and C[:20] in caplog.text
    numbers[C] = [0.9, 0.1]
    fuser(ready, show_progress=False)
    assert contexts(ready, C) == [(), (B,)]


def test_a_text_that_has_no_embedding_does_not_keep_the_others_from_being_fused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ready = engine()
    numbers = {B: [1.0, 0.1], C: [1.0, 0.2], D: [0.0, 1.0]}
    fuser = Fuser(1, lambda texts: [numbers[text] for text in texts])
    ready.ensure([A, B, C])
    fuser(ready, show_progress=False)
    assert [ready.fused(text) for text in (A, B, C)] == [[], [(C,)], [(B,)]] and "no neighbours" in caplog.text
    ready.ensure([D])  # when the only other new one is it, too
    fuser(ready, show_progress=False)
    assert ready.fused(D) == [(C,)]


def test_an_embedding_function_that_is_away_is_not_asked_for_every_text() -> None:
    ready, asked = engine(), []

    def away(texts: list[str]) -> Any:
        asked.append(texts)
        raise ConnectionError

    ready.ensure(PASSAGES)
    Fuser(1, away)(ready, show_progress=False)
    assert list(map(len, asked)) == [5, 1, 1, 1]


def test_a_neighbour_that_was_forgotten_and_comes_back_is_fused_with_again() -> None:
    ready = engine()
    numbers = {A: [1.0, 0.0], B: [1.0, 0.1], C: [0.0, 1.0], D: [0.1, 1.0]}
    fuser = Fuser(1, lambda texts: [numbers[text] for text in texts])
    ready.ensure([A, B, C, D])
    fuser(ready, show_progress=False)
    ready.forget([A])
    fuser.follow(ready)
    ready.ensure([A])
    fuser(ready, show_progress=False)
    assert [ready.fused(text) for text in (A, B, C, D)] == [[(B,)], [(A,)], [(D,)], [(C,)]]


def test_what_is_about_to_be_forgotten_is_nobody_s_neighbour() -> None:
    ready = engine()
    numbers = {A: [1.0, 0.0], B: [1.0, 0.1], C: [1.0, 0.5]}
    ready.ensure([A, B, C])
    Fuser(1, lambda texts: [numbers[text] for text in texts])(ready, show_progress=False, without=[A + "\n"])
    assert [ready.fused(text) for text in (A, B, C)] == [[], [(C,)], [(B,)]]


def test_embeddings_that_are_there_are_not_asked_for() -> None:
    ready, asked = engine(), []

    def embed(texts: list[str]) -> Any:
        asked.extend(texts)
        return [[0.0, 1.0] for _ in texts]

    ready.ensure([A, B, C])
    Fuser(1, embed)(ready, show_progress=False, vectors={A: [1.0, 0.0], B: [1.0, 0.1]})
    assert asked == [C] and ready.fused(A) == [(B,)] and ready.fused(C) == [(B,)]


def test_a_method_that_takes_no_fused_variants_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    ready = Engine(tiny_backbone(), method="query_guided")
    ready.ensure([A, B])
    fuser = Fuser(1, _counting)
    for _ in range(2):
        fuser(ready, show_progress=False)
    assert ready.fused(A) == [(B,)]  # for requests that name another
    assert [r.message for r in caplog.records if "takes no fused variants" in r.message] == [
        "query_guided, the engine's method, takes no fused variants; auto, fusionrag and query_guided:fused=True do"
    ]


@pytest.mark.parametrize("count", [0, -3, 2.5, "10", True, None])
def test_a_fuser_wants_a_whole_number(count: Any) -> None:
    with pytest.raises(ConfigurationError, match="fuse is how many"):
        Fuser(count, lambda texts: [])


def test_a_fuser_that_was_copied_or_pickled_goes_on() -> None:
    ready = engine()
    ready.ensure([A, B])
    for again in (copy.deepcopy(Fuser(1, _counting)), pickle.loads(pickle.dumps(Fuser(1, _counting)))):
        again(ready, show_progress=False)
        assert ready.fused(A) == [(B,)]


def _counting(texts: list[str]) -> list[list[float]]:
    return [[1.0, float(number)] for number, _ in enumerate(texts)]


def test_an_embedding_function_that_fails_says_so_itself() -> None:
    with pytest.raises(ZeroDivisionError):
        similar(["a"], lambda texts: 1 / 0)


def test_many_texts_are_compared_in_batches() -> None:
    count = 2500  # of 1,024 each
    vectors = np.random.default_rng(0).normal(size=(count, 8))
    known = Neighbourhood(5)
    known.add([f"text {n}" for n in range(count)], vectors)
    found = known.nearest()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for mine in (3, 1023, 1024, 2499):
        best = np.argsort(-(unit @ unit[mine]))
        assert found[f"text {mine}"] == [f"text {n}" for n in best if n != mine][:5]


def test_a_neighbourhood_says_what_changed_until_it_is_settled() -> None:
    known = Neighbourhood(2, tolerance=0.5)
    known.add(["a", "b", "c", "d"], [[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]])
    first = known.changed()
    assert set(first) == {"a", "b", "c", "d"} and known.changed() == first
    known.settled({text: first[text] for text in "abc"})
    assert set(known.changed()) == {"d"}  # as when it could not be fused
    known.settled(known.changed())
    assert known.changed() == {}
    known.add(["e"], [[1.0, 0.05]])  # one of a's, b's and c's two neighbours at most is another now
    assert set(known.changed()) == {"e"}
    known.settled(known.changed())
    known.add(["f"], [[1.0, 0.01]])  # now both of a's are
    assert {"a", "f"} <= set(known.changed())
    known.settled(known.changed())
    known.remove(["e"])
    assert "a" in known.changed()  # what it was fused with is no more
    with pytest.raises(ConfigurationError, match="tolerance"):
        Neighbourhood(tolerance=1.0)
