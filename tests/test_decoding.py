"""Token ids to text: nothing lost, nothing twice, nothing half."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cacheclip_rag.report import Report
from cacheclip_rag.serving.decoding import TextStream
from cacheclip_rag.weights.pull import resolve

MODELS = ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"]


@cache
def load(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve(name, progress=False))


@pytest.fixture(params=MODELS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return load(request.param)


class Source(Iterator[int]):
    """Tokens that know how many were asked for and whether they were closed."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids, self.taken, self.closed = list(ids), 0, 0

    def __next__(self) -> int:
        if self.closed or self.taken == len(self.ids):
            raise StopIteration
        self.taken += 1
        return self.ids[self.taken - 1]

    def close(self) -> None:
        self.closed += 1


def stream(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *stop: str) -> tuple[TextStream, Source]:
    source = Source(ids)
    return TextStream(source, tokenizer, Report("test", 0.0), stop), source


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


TEXT = """The harbour of Otto was built in 1847.  It holds 3,140 ships —
and more, naïvely counted: 東京タワー, שלום עולם, 🦊🫠🧌🪿 and 👩‍👩‍👧‍👦.

    def f(x):
        return x  # indented

\tTabs, too.\r\n   Trailing blanks   """


@pytest.mark.parametrize(
    "text", [TEXT, TEXT * 20, "", " ", "\n", " leading", "🦊", "x" * 3000, "\n" * 200, "a. b , c !"]
)
def test_the_pieces_joined_are_the_decoded_answer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = encode(tokenizer, text)
    answer, source = stream(tokenizer, ids)
    pieces = list(answer)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert all(pieces) and source.taken == len(ids) and answer.ids == ids


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.sampled_from(MODELS))
def test_any_text_streams_as_it_decodes_and_no_character_in_parts(text: str, model: str) -> None:
    tokenizer = load(model)
    ids = encode(tokenizer, text)
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    answer, _ = stream(tokenizer, ids)
    pieces = list(answer)
    assert "".join(pieces) == decoded
    assert "\ufffd" in decoded or not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40_000), max_size=150), st.sampled_from(MODELS))
def test_any_ids_stream_as_they_decode(ids: list[int], model: str) -> None:
    tokenizer = load(model)
    newline = encode(tokenizer, "\n")
    ids = [token for i, token in enumerate(ids) for token in ([token, *newline] if i % 9 == 8 else [token])]
    answer, _ = stream(tokenizer, ids)
    assert "".join(answer) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_character_cut_off_by_the_length_limit_is_shown_as_decoding_shows_it() -> None:
    tokenizer = load(MODELS[0])
    ids = encode(tokenizer, "ok 🧌")
    assert len(ids) > 3
    for end in range(1, len(ids) + 1):
        answer, _ = stream(tokenizer, ids[:end])
        pieces = list(answer)
        assert "".join(pieces) == tokenizer.decode(ids[:end])
        assert not any("\ufffd" in piece for piece in pieces[:-1])


def test_text_comes_as_soon_as_it_is_certain(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode(tokenizer, "one two three four")
    answer, source = stream(tokenizer, ids)
    for number in range(1, len(ids) + 1):
        assert next(answer) and source.taken == number
    assert list(answer) == []


def test_special_tokens_are_not_in_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids = [start, *encode(tokenizer, "yes 🦊"), start, *encode(tokenizer, " sir"), end]
    answer, _ = stream(tokenizer, ids)
    assert "".join(answer) == "yes 🦊 sir"
    assert answer.ids == ids


def test_only_special_tokens_are_an_empty_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    answer, _ = stream(tokenizer, [tokenizer.convert_tokens_to_ids("<|im_end|>")])
    assert list(answer) == []


# A tokenizer of the Llama 2 kind: blanks are "▁", bytes stand for what has no token, and decoding takes away one
# leading blank, which is why text cannot be decoded from the middle on.


@cache
def sentencepiece() -> PreTrainedTokenizerBase:
    pieces = ["<unk>", "▁", "▁▁▁", "▁the", "the", "▁def", "x", "=", "1", "return", "▁return"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    blanks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(blanks)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_indentation_survives_a_long_answer_of_a_sentencepiece_model() -> None:
    tokenizer = sentencepiece()
    line = ["▁▁▁", "▁the", "x", "=", "1", "<0x0A>"]
    ids = tokenizer.convert_tokens_to_ids(["▁the", "<0x0A>", *line * 40])
    text = tokenizer.decode(ids)
    assert text.count("\n    thex=1") == 40
    answer, _ = stream(tokenizer, ids)
    assert "".join(answer) == text


def test_bytes_of_a_sentencepiece_model_become_characters() -> None:
    tokenizer = sentencepiece()
    ids = tokenizer.convert_tokens_to_ids(["▁the", *(f"<0x{byte:02X}>" for byte in " 🦊é\n".encode())] * 30)
    answer, _ = stream(tokenizer, ids)
    pieces = list(answer)
    assert "".join(pieces) == tokenizer.decode(ids) and "\ufffd" not in "".join(pieces)


# ---- stop strings ------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.text("ab \n", max_size=80), st.text("ab \n", min_size=1, max_size=5), st.sampled_from(MODELS))
def test_text_ends_exactly_before_the_stop_string(text: str, stop: str, model: str) -> None:
    tokenizer = load(model)
    answer, source = stream(tokenizer, encode(tokenizer, text), stop)
    result = "".join(answer)
    assert result == text.partition(stop)[0]
    assert answer.report.finish_reason == ("stop" if stop in text else "")
    if stop in text:
        assert source.closed and list(answer) == []
        # and no token later than the one that completed it was asked for
        assert stop not in tokenizer.decode(answer.ids[:-1]) and stop in tokenizer.decode(answer.ids)
    else:
        assert not source.closed


@settings(max_examples=200, deadline=None)
@given(st.text("abc🦊", max_size=60), st.lists(st.text("abc🦊", min_size=1, max_size=4), min_size=2, max_size=4))
def test_several_stop_strings(text: str, stops: list[str]) -> None:
    tokenizer = load(MODELS[0])
    answer, _ = stream(tokenizer, encode(tokenizer, text), *stops)
    result = "".join(answer)
    assert text.startswith(result) and not any(stop in result for stop in stops)
    assert result == text or any(text[len(result) :].startswith(stop) for stop in stops)


def test_a_stop_string_across_tokens_is_never_shown_in_part() -> None:
    tokenizer = load(MODELS[0])
    ids = [token for piece in ["ok", "<", "st", "op", ">", "!"] for token in encode(tokenizer, piece)]
    answer, _ = stream(tokenizer, ids, "<stop>")
    assert list(answer) == ["ok"]
    # what only looked like its beginning comes after all
    answer, _ = stream(tokenizer, ids[:-2], "<stop>")
    assert "".join(answer) == "ok<stop"
    answer, _ = stream(tokenizer, [*ids[:-2], *ids[1:]], "<stop>")
    assert "".join(answer) == "ok<stop"


def test_of_two_stop_strings_the_earlier_in_the_text_counts() -> None:
    tokenizer = load(MODELS[0])
    for stops in (["\n\n", "Question:"], ["Question:", "\n\n"]):
        answer, _ = stream(tokenizer, encode(tokenizer, "Paris.\n\nQuestion: why?"), *stops)
        assert "".join(answer) == "Paris."
    answer, _ = stream(tokenizer, encode(tokenizer, "abcdef"), "", "def", "cd")
    assert "".join(answer) == "ab"


def test_a_stop_string_far_into_a_long_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    text = TEXT * 10 + "END" + TEXT
    answer, source = stream(tokenizer, encode(tokenizer, text), "END")
    assert "".join(answer) == TEXT * 10
    assert source.closed and source.taken < len(source.ids)


def test_an_empty_stop_string_stops_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    answer, _ = stream(tokenizer, encode(tokenizer, "all of it"), "")
    assert "".join(answer) == "all of it"


# ---- ending early ------------------------------------------------------------------------------------------------


def begin(tokenizer: PreTrainedTokenizerBase) -> tuple[TextStream, Source]:
    answer, source = stream(tokenizer, encode(tokenizer, "one two three four five"))
    next(answer), next(answer)
    return answer, source


def leave(answer: TextStream) -> None:
    with answer:
        pass


def fail(answer: TextStream) -> None:
    with pytest.raises(KeyError), answer:
        raise KeyError


@pytest.mark.parametrize("end", [TextStream.close, leave, fail])
def test_an_early_end_closes_the_source(end: Callable[[TextStream], None]) -> None:
    answer, source = begin(load(MODELS[0]))
    end(answer)
    assert source.closed and source.taken == 2
    assert list(answer) == [] and answer.ids == source.ids[:2]
    answer.close()  # twice is fine


def test_dropping_the_stream_closes_a_generator() -> None:
    tokenizer, log = load(MODELS[0]), []

    def tokens() -> Iterator[int]:
        try:
            yield from encode(tokenizer, "one two three")
        finally:
            log.append("closed")

    answer = TextStream(tokens(), tokenizer, Report("test", 0.0))
    assert next(answer) and not log
    del answer
    assert log == ["closed"]


def test_a_source_that_cannot_be_closed_will_do() -> None:
    tokenizer = load(MODELS[0])
    answer = TextStream(iter(encode(tokenizer, "one two")), tokenizer, Report("test", 0.0), ["two"])
    assert "".join(answer) == "one "
    answer.close()


def test_an_error_of_the_source_comes_through() -> None:
    tokenizer = load(MODELS[0])

    def tokens() -> Iterator[int]:
        yield from encode(tokenizer, "one")
        raise RuntimeError("out of memory")

    answer = TextStream(tokens(), tokenizer, Report("test", 0.0))
    assert next(answer) == "one"
    with pytest.raises(RuntimeError, match="out of memory"):
        next(answer)
    assert list(answer) == []
