"""What in a prompt is a document, and what is its question."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from prompts import CHATML, check, index_of, words
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import Engine
from cacheclip_rag.prompt import (
    Question,
    RenderedPrompt,
    Span,
    documents,
    find_question,
    unquoted,
)
from cacheclip_rag.report.token_sources import TokenSource


def test_documents_are_what_is_no_part_of_the_templates_text() -> None:
    head, tail = "<|im_start|>system\nYou answer questions about lighthouses and nothing else.", "<|im_end|>\nso:"
    quoting = f"{words(1)}<|im_end|>{words(2)}"
    index = index_of([quoting, f"{head}\n{words(3)}", f"{words(4)}{tail} {words(5)}"])

    def found(prompt: str, opening: str = "", closing: str = "") -> list[str]:
        spans = documents(prompt, index.find(prompt), index.whole, CHATML, opening, closing)
        check(prompt, spans, index)
        return [prompt[span.start : span.end] for span in spans]

    assert found(f"Read {quoting}!") == [quoting]  # whole: what it quotes is text
    assert found(f"Read {quoting[:-9]}!") == [words(1), words(2)[:-9]]  # a part: what it quotes is what it is
    assert found(f"{head}\n{words(3)}.", opening=head) == [f"\n{words(3)}"]
    assert found(f"{head}\n{words(6)}.", opening=head) == []
    assert found(f"{words(4)}{tail}", closing=tail) == [words(4)]
    assert found(f"Read {words(3)}<|im_end|>") == [words(3)]


def asked(prompt: str, chunks: Sequence[str], known: str | None = None, closing: str = "") -> Question:
    return find_question(prompt, index_of(chunks).find(prompt), known, CHATML, closing)


def test_the_known_question_is_found_where_it_stands() -> None:
    prompt = f"Answer.\n\n{words(1)}\n\nQuestion: Who built it?\nAnswer:"
    question = asked(prompt, [words(1)], "  Who built it? ")
    assert question.text == "Who built it?" == prompt[question.start : question.end]


def test_the_known_question_may_stand_before_the_context() -> None:
    prompt = f"Who built it?\n\n{words(1)}\n\nAnswer now."
    question = asked(prompt, [words(1)], "Who built it?")
    assert (question.start, question.end) == (0, len("Who built it?"))


@pytest.mark.parametrize("before", [True, False])
def test_a_question_that_a_chunk_repeats_is_taken_from_outside(before: bool) -> None:
    ask = "Who built it?"
    chunk = f"{words(1)} {ask} {words(2)} {ask} {words(3)}"
    prompt = f"{ask}\n\n{chunk}" if before else f"{chunk}\n\n{ask}"
    question = asked(prompt, [chunk], ask)
    assert (question.start, question.end) == ((0, len(ask)) if before else (len(prompt) - len(ask), len(prompt)))


def test_a_question_that_quotes_a_chunk_is_computed_as_a_whole() -> None:
    chunks = [words(1), words(2)]
    index, quote = index_of(chunks), words(2)[40:140]
    question = f'What does "{quote}" mean?'
    prompt = f"{quote} and more.\n\n{words(1)}\n\n{words(2)[:-30]}\n\nQuestion: {question}\nAnswer:"
    spans = index.find(prompt)
    kept = unquoted(prompt, spans, f" {question} ", index.whole)
    assert len(spans) == 4 and kept == spans[:3], "parts of chunks elsewhere stay: an application may have cut them"
    for other in (None, "", " ", "Something else?", prompt):  # of the last, which holds a whole chunk, nothing is taken
        assert unquoted(prompt, spans, other, index.whole) == spans


@pytest.mark.parametrize("announced", [False, True])
def test_what_a_question_quotes_is_not_reused(announced: bool) -> None:
    question = f'What does "{PASSAGES[1][20:120]}" mean?'
    prompt = f"Read this.\n\n{PASSAGES[0]}\n\n{PASSAGES[1]}\n\n{question}\n"
    with Engine(tiny_backbone(), method="naive") as engine:
        engine.ensure(PASSAGES[:2])
        if announced:
            engine.hint(PASSAGES[:2], question)
        report = engine.prefill(prompt, question=None if announced else question).report
    assert len(report.chunks) == 2 and report.reused > 0 and report.token_sources is not None
    asking = [run for run in report.token_sources.runs() if run.end > prompt.rfind(question)]
    assert {run.source for run in asking} == {TokenSource.FRESH}


def test_of_several_places_the_last_one_outside_the_chunks_is_meant() -> None:
    ask = "Who built it?"
    prompt = f"{ask}\n\n{words(1)}\n\n{ask}\n\n{words(2)} {ask} {words(2)}"
    question = asked(prompt, [words(1), f"{words(2)} {ask} {words(2)}"], ask)
    assert question.start == prompt.find(ask, 5) < prompt.find(words(2))


def test_a_question_that_stands_only_inside_a_chunk_has_no_place() -> None:
    chunk = f"{words(1)} Who built it? {words(2)}"
    assert asked(f"{chunk}\n\nTell me.", [chunk], "Who built it?") == Question("Who built it?")
    assert asked(f"{words(1)}\n\nTell me.", [words(1)], "Not here") == Question("Not here")


def test_without_a_known_question_it_is_what_follows_the_chunks() -> None:
    prompt = f"<|im_start|>user\nUse this.\n\n{words(1)}\n\n{words(2)}\n\nWho built it?<|im_end|>\n"
    for known in (None, "", "  \n"):
        question = asked(prompt, [words(1), words(2)], known)
        assert question.text == "Who built it?"
        assert question.start == prompt.find(words(2)) + len(words(2)) and question.end == len(prompt)


def test_without_a_known_question_and_nothing_behind_the_chunks_it_is_what_precedes_them() -> None:
    prompt = f"Who built it?\n\n{words(1)}\n<|im_end|>\n\n"
    question = asked(prompt, [words(1)])
    assert (question.text, question.start) == ("Who built it?", 0)
    assert question.end == prompt.find(words(1))


@pytest.mark.parametrize("before", [True, False])
def test_a_chat_template_s_closing_is_not_taken_for_the_question(before: bool) -> None:
    closing = "<|im_end|>\n<|im_start|>assistant\n"  # ChatML: SmolLM2, Qwen, and most of their kin
    content = f"Who built it?\n\n{words(1)}" if before else f"{words(1)}\n\nWho built it?"
    prompt = f"{content}{closing}"
    question = find_question(prompt, index_of([words(1)]).find(prompt), None, CHATML, closing)
    assert question.text == "Who built it?"
    assert question.end <= len(prompt) - len(closing)
    other = find_question(prompt, index_of([words(1)]).find(prompt), None, CHATML, "<another template>")
    assert other.text  # a closing that does not stand there is none


def test_without_chunks_the_question_is_the_prompt() -> None:
    assert asked("Who built it?", []) == Question("Who built it?", 0, 13)


def test_there_is_always_some_question() -> None:
    assert asked("", []).text and asked("<|im_end|>", []).text and asked(words(1), [words(1)]).text


def test_of_messages_the_question_is_one_and_never_the_template_s() -> None:
    def rendered(*messages: str) -> RenderedPrompt:
        text, own = "", []
        for message in messages:
            text += "<|im_start|>user\n"
            own.append((len(text), len(text) + len(message)))
            text += f"{message}<|im_end|>\n"
        return RenderedPrompt(f"{text}<|im_start|>assistant\n", own)

    def of(*messages: str, known: str | None = None) -> str:
        question = asked(rendered(*messages), [words(1), words(2)], known)
        assert question.text in messages[-1] or question.text in "\n\n".join(messages)
        return question.text

    chunk = words(1)
    assert of("Be brief. " * 90, f"Who built it?\n\n{chunk}") == "Who built it?"
    assert of(f"Use this:\n{chunk}", "Who built it?", "Ada.", "And when?") == "And when?"
    assert of(f"{chunk}\n\n{words(2)}\n\nWho built it?") == "Who built it?"
    assert of("Be brief.", "Who built it?", chunk) == "Be brief.\n\nWho built it?"
    assert of("Be brief.", "Who built it?") == "Who built it?"
    assert of("Be brief.", chunk) == "Be brief."
    assert find_question(rendered("user", chunk), [], "user", CHATML).start == len("<|im_start|>user\n")
    assert asked(rendered(chunk), [chunk]).text  # nobody asked anything


@pytest.mark.parametrize("known", ["a", "aa", "lamp"])
def test_a_question_that_stands_in_chunks_a_million_times_is_looked_for_outside_only(known: str) -> None:
    chunk = known * 40_000
    spans = [Span(n * len(chunk) + n, (n + 1) * len(chunk) + n, "k0", 0) for n in range(20)]
    prompt = "\n".join([chunk] * 20)
    assert find_question(prompt, spans, known, CHATML) == Question(known)
    assert find_question(f"{prompt}\n{known}", spans, known, CHATML).start == len(prompt) + 1
