"""What a retriever announced counts for its caller's prompt only, and only where it stands as a question."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest

from cacheclip_rag.prompt import Span
from cacheclip_rag.serving.callers import calling, named
from cacheclip_rag.serving.hints import Hints

CONTEXT = "The lighthouse at Cape Morrow was built in 1874 by the engineer Ada Lindqvist."
OWN = "Who built the lighthouse, and when?"
PROMPT = f"Read, and answer a question.\n\n{CONTEXT}\n\n{CONTEXT}\n\nQuestion: {OWN}\nAnswer:"
FIRST = PROMPT.index(CONTEXT)
SECOND = PROMPT.rindex(CONTEXT)
SPANS = [Span(FIRST, FIRST + len(CONTEXT), "k0", 0), Span(SECOND, SECOND + len(CONTEXT), "k1", 0)]


def hints(*noted: tuple[str | None, list[str]]) -> Hints:
    result = Hints()
    for question, keys in noted:
        result.note(question, keys)
    return result


def test_a_question_counts_with_its_chunks_behind_them() -> None:
    assert hints((OWN, ["k0", "k1"])).question(PROMPT, SPANS) == OWN
    assert hints((OWN, ["k0", "k1", "k2"])).question(PROMPT, SPANS[:1]) == OWN, "a prompt may hold some of them"
    assert hints((OWN, ["k0"])).question(PROMPT, SPANS) == OWN, "or some more, of earlier turns"
    assert hints((f" {OWN}\n", ["k0", "k1"])).question(PROMPT, SPANS) == OWN


@pytest.mark.parametrize("keys", [[], ["k2"], ["k2", "k3"]])
@pytest.mark.parametrize("question", [OWN, "when?", "a"])
def test_without_its_chunks_it_does_not(question: str, keys: list[str]) -> None:
    assert hints((question, keys)).question(PROMPT, SPANS) is None
    assert hints((question, ["k0", "k1"])).question(PROMPT, []) is None


def test_nor_with_a_few_of_them() -> None:
    spans = [Span(n * 100, n * 100 + 80, f"k{n}", 0) for n in range(5)]
    prompt = f"{'.' * 480} when?"
    assert hints(("when?", ["k4"])).question(prompt, spans) is None
    assert hints(("when?", ["k4", "k3", "k1"])).question(prompt, spans) == "when?"


@pytest.mark.parametrize(
    "question", ["a", "the", "ho", "uestion", "Rea", "when?", "lighthouse", "1874", "answer a question", "", " "]
)
def test_parts_of_words_and_of_sentences_and_what_stands_before_or_in_the_chunks_is_no_question(question: str) -> None:
    assert hints((question, ["k0", "k1"])).question(PROMPT, SPANS) is None


def test_before_the_chunks_it_counts_on_a_line_of_its_own() -> None:
    for head in (f"{OWN}\n\n", f"The original query is as follows: {OWN}\nRefine.\n", f"问题：{OWN}\n"):
        spans = [Span(len(head), len(head) + len(CONTEXT), "k0", 0)]
        assert hints((OWN, ["k0"])).question(f"{head}{CONTEXT}\n\nRefined:", spans) == OWN
        assert hints(("and when?", ["k0"])).question(f"{head}{CONTEXT}\n\nRefined:", spans) is None


def test_of_several_the_one_nearest_to_the_end_then_the_longest_then_the_latest_counts() -> None:
    keys = ["k0", "k1"]
    prompt = PROMPT.replace("Answer:", "Ada.\nQuestion: Since when?\nAnswer:")
    assert hints((OWN, keys), ("Since when?", keys)).question(prompt, SPANS) == "Since when?"
    assert hints(("Since when?", keys), (OWN, keys)).question(prompt, SPANS) == "Since when?"
    assert hints((OWN, keys), ("and when?", keys)).question(PROMPT, SPANS) == OWN


def test_an_announcement_is_its_caller_s() -> None:
    both = Hints()
    both.note(OWN, ["k0", "k1"], caller="one")
    both.note("the lighthouse, and when?", ["k0", "k1", "k2"], caller="two")
    assert both.question(PROMPT, SPANS, caller="one") == OWN and both.keys("one") == {"k0", "k1"}
    assert both.question(PROMPT, SPANS, caller="two") == "the lighthouse, and when?"
    assert both.keys("two") == {"k0", "k1", "k2"}
    assert both.question(PROMPT, SPANS) is None and both.keys() == frozenset()


def test_a_block_names_the_caller_of_what_names_none() -> None:
    assert named(None) is None
    with calling("one"):
        assert (named(None), named("two")) == ("one", "two")
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(named, None).result() is None, "threads have a context of their own"
            assert pool.submit(copy_context().run, named, None).result() == "one"
        with pytest.raises(ValueError), calling(("two", 2)):
            assert named(None) == ("two", 2)
            raise ValueError
        assert named(None) == "one"
    assert named(None) is None
    with pytest.raises(TypeError), calling(["two"]):
        pass


def test_the_latest_are_remembered() -> None:
    noted = Hints()
    for number in range(300):
        noted.note(f"Question {number}?", [f"k{number}"])
    assert noted.keys() == {f"k{number}" for number in range(292, 300)}
    span = Span(0, 10, "k5", 0)
    assert noted.question(f"{'.' * 10} Question 5?", [span]) is None
    assert noted.question(f"{'.' * 10} Question 299?", [Span(0, 10, "k299", 0)]) == "Question 299?"


def test_a_question_that_stands_there_a_million_times_costs_no_more_than_a_few_looks() -> None:
    looked = 0

    class Prompt(str):
        def rfind(self, *given: object) -> int:
            nonlocal looked
            looked += 1
            return super().rfind(*given)  # type: ignore[arg-type]

    assert hints(("a", ["k0"])).question(Prompt("a" * 1_000_000), [Span(0, 10, "k0", 0)]) is None
    assert looked < 200
