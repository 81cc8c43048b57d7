"""Token by token: which stored token stands where in a prompt, by its id and its characters."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import CHATML, check, index_of, whole, words
from tiny import PASSAGES
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cacheclip_rag.chunks import canonical
from cacheclip_rag.model.tokenizer import PromptTokenizer
from cacheclip_rag.prompt import (
    ChunkIndex,
    Layout,
    Question,
    Span,
    align,
    find_question,
)
from cacheclip_rag.weights.pull import resolve


@cache
def load(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(resolve(name, progress=False))


MODELS = ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"]


@pytest.fixture(params=MODELS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return load(request.param)


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[Tensor, Tensor]:
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    return torch.tensor(encoding.ids, dtype=torch.long), torch.tensor(encoding.offsets, dtype=torch.long).reshape(-1, 2)


def lay_out(tokenizer: PreTrainedTokenizerBase, prompt: str, chunks: Sequence[str]) -> tuple[Layout, ChunkIndex]:
    index = index_of(chunks)
    spans = index.find(prompt)
    stored = [tokenise(tokenizer, index.text(span.key) or "") for span in spans]
    return align(prompt, *tokenise(tokenizer, prompt), spans, stored), index


def check_layout(layout: Layout, index: ChunkIndex, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every token is reused, edge or fresh, and a reused one is the very same piece of text as the stored one."""
    ids, offsets = layout.ids, layout.offsets
    assert layout.prompt and len(layout) == len(ids) == len(layout.chunk) == len(layout.token) == len(layout.edge)
    assert torch.equal(layout.reusable, layout.chunk >= 0)
    assert not (layout.reusable & layout.edge).any()
    assert torch.equal(layout.chunk >= 0, layout.token >= 0)
    inside = torch.full((len(layout),), -1)
    for number, span in enumerate(layout.spans):
        inside[(offsets[:, 0] >= span.start) & (offsets[:, 0] < span.end)] = number
    assert torch.equal(layout.reusable | layout.edge, inside >= 0)
    assert torch.equal(layout.chunk[layout.reusable], inside[layout.reusable])
    sizes = [len(piece) for piece in tokenizer.convert_ids_to_tokens(ids.tolist())]  # byte-level: a character a byte
    bytes_before = np.cumsum([0, *sizes])
    for number, span in enumerate(layout.spans):
        text = index.text(span.key) or ""
        stored_ids, stored_offsets = tokenise(tokenizer, text)
        stored_sizes = [len(piece) for piece in tokenizer.convert_ids_to_tokens(stored_ids.tolist())]
        stored_before = np.cumsum([0, *stored_sizes])
        rows = (layout.chunk == number).nonzero()[:, 0]
        tokens = layout.token[rows]
        assert (tokens.diff() > 0).all()
        assert torch.equal(ids[rows], stored_ids[tokens])
        assert torch.equal(offsets[rows] - span.start, stored_offsets[tokens] - span.offset)
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            (a, b), (c, d) = offsets[row].tolist(), stored_offsets[token].tolist()
            assert layout.prompt[a:b] == text[c:d]
            mine = bytes_before[row] - len(layout.prompt[: span.start].encode())
            assert mine == stored_before[token] - len(text[: span.offset].encode()), "another byte of it"


def check_runs(layout: Layout) -> None:
    chunk, token = torch.full_like(layout.chunk, -1), torch.full_like(layout.token, -1)
    previous = (-1, -1, slice(0, 0))
    for run in layout.runs():
        number, row, part = run
        size = part.stop - part.start
        assert size > 0 and (chunk[row : row + size] == -1).all()
        chunk[row : row + size], token[row : row + size] = number, torch.arange(part.start, part.stop)
        joins = previous[0] == number and previous[2].stop == part.start
        assert not (joins and previous[1] + previous[2].stop - previous[2].start == row), "not maximal"
        previous = run
    assert torch.equal(chunk, layout.chunk) and torch.equal(token, layout.token)


def documentation(count: int, size: int = 900) -> list[str]:
    """Real prose and code: Python's reference manual as `help` shows it, in pieces that begin at any word."""
    pieces = []
    for _, text in sorted(topics.items()):
        at = 0
        while at + size < len(text):
            pieces.append(canonical(text[at : at + size]))
            at = text.find(" ", at + size) + 1 or len(text)
    return random.Random(0).sample(pieces, count)


@pytest.mark.parametrize("separator", ["\n\n", " ", "\n", "\n\n---\n\n"])
def test_nearly_all_of_real_text_is_reusable(tokenizer: PreTrainedTokenizerBase, separator: str) -> None:
    chunks = documentation(60)
    index = index_of(chunks)
    total = reused = 0
    for at in range(0, len(chunks), 10):
        prompt = "Read this." + separator + separator.join(chunks[at : at + 10]) + separator + "What does it say?"
        layout, _ = lay_out(tokenizer, prompt, chunks)
        assert whole(layout.spans, index) == [f"k{i}" for i in range(at, at + 10)]
        check_layout(layout, index, tokenizer)
        check_runs(layout)
        total += int((layout.reusable | layout.edge).sum())
        reused += int(layout.reusable.sum())
    assert reused / total > 0.99


PIECES = ["word ", "Wort", " ", "  ", "\n", "\n\n", "3.14", "naïve", "東京", "שלום ", "🦊", "🫠", "🇩🇪", "\t", "—"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(PIECES), min_size=30, max_size=60).map("".join), min_size=1, max_size=3),
    st.sampled_from(["\n\n", " ", "\n", "", "🦊", ":"]),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 50), st.integers(64, 400)), min_size=1, max_size=4),
    st.sampled_from(MODELS),
)
def test_every_token_is_reused_edge_or_fresh_once(
    texts: list[str], separator: str, slices: list[tuple[int, int, int]], model: str
) -> None:
    texts = [canonical(text) for text in texts]
    parts = [texts[which % len(texts)][start : start + size] for which, start, size in slices]
    prompt = "Read: " + separator.join(parts) + separator + "What?"
    layout, index = lay_out(load(model), prompt, texts)
    check(prompt, layout.spans, index)
    check_layout(layout, index, load(model))
    check_runs(layout)


def test_emoji_of_several_tokens_are_reused_piece_by_piece() -> None:
    tokenizer, text = load(MODELS[0]), "🦊🫠🦤 the fox 🫥 and the dodo 🧌 met 🪼 at the 🪸 reef near the long 🛝"
    layout, index = lay_out(tokenizer, f"Read:\n{text}\nWhat?", [text])
    offsets = layout.offsets.tolist()
    assert any(a == b for a, b in pairwise(offsets)), "these emoji are several tokens each"
    check_layout(layout, index, tokenizer)
    assert layout.reusable.sum() >= len(tokenise(tokenizer, text)[0]) - 2


@pytest.mark.parametrize("emoji", "🔔👑🐐🎎")
def test_no_byte_of_a_character_is_taken_for_another(emoji: str) -> None:
    # The last two bytes of these are equal. Behind a blank, the first of the emoji's three tokens melts into the blank,
    # and the second of the remaining two must not take the KV of the stored second of three.
    tokenizer, text = load(MODELS[0]), f"{emoji} {words(1, 12)}"
    layout, index = lay_out(tokenizer, f"Read: {text}", [text])
    check_layout(layout, index, tokenizer)


def test_a_chunk_that_stands_there_twice_is_reused_twice(tokenizer: PreTrainedTokenizerBase) -> None:
    text = documentation(1)[0]
    layout, index = lay_out(tokenizer, f"Read:\n\n{text}\n\n{text}\n\nWhat?", [text])
    check_layout(layout, index, tokenizer)
    check_runs(layout)
    count = len(tokenise(tokenizer, text)[0])
    for number in (0, 1):
        assert (layout.chunk == number).sum() >= 0.98 * count
    assert {run[0] for run in layout.runs()} == {0, 1}


def test_an_infix_takes_the_tokens_of_its_place(tokenizer: PreTrainedTokenizerBase) -> None:
    text = documentation(3)[2]
    layout, index = lay_out(tokenizer, f"Read: {text[303:707]}; what?", [text])
    assert layout.spans[0].offset <= 303
    check_layout(layout, index, tokenizer)
    assert layout.reusable.sum() > 50 and int(layout.token[layout.reusable].min()) > 20


def test_a_token_that_sticks_out_of_its_chunk_is_not_reused(tokenizer: PreTrainedTokenizerBase) -> None:
    text = words(1, 20) + " inter"
    prompt = f"{text}national{words(2, 10)}"
    layout, index = lay_out(tokenizer, prompt, [text])
    check_layout(layout, index, tokenizer)
    end = layout.spans[0].end
    assert end == len(text)
    over = (layout.offsets[:, 0] < end) & (layout.offsets[:, 1] > end)
    assert over.any() and layout.edge[over].all()


def pieces(*pairs: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    return torch.tensor([i for i, _, _ in pairs]), torch.tensor([[a, b] for _, a, b in pairs]).reshape(-1, 2)


def test_only_the_same_id_at_the_same_characters_is_reused() -> None:
    # the prompt "xABCDEy" with the chunk "ABCDE" at 1..6, tokenised by hand
    ids, offsets = pieces((9, 0, 1), (1, 1, 2), (2, 2, 4), (3, 4, 5), (4, 5, 7))
    spans = [Span(1, 6, "k", 0)]
    same = pieces((1, 0, 1), (2, 1, 3), (3, 3, 4), (4, 4, 6))
    layout = align("xABCDEy", ids, offsets, spans, [same])
    assert layout.token.tolist() == [-1, 0, 1, 2, -1]  # the last one sticks out of the span
    assert layout.edge.tolist() == [False, False, False, False, True]
    other_id = pieces((1, 0, 1), (7, 1, 3), (3, 3, 4), (5, 4, 5))
    assert align("xABCDEy", ids, offsets, spans, [other_id]).token.tolist() == [-1, 0, -1, 2, -1]
    other_cut = pieces((1, 0, 1), (2, 1, 2), (3, 2, 4), (5, 4, 5))
    layout = align("xABCDEy", ids, offsets, spans, [other_cut])
    assert layout.token.tolist() == [-1, 0, -1, -1, -1] and layout.edge.tolist() == [False, False, True, True, True]
    infix = [Span(1, 6, "k", 10)]
    moved = pieces((8, 0, 10), (1, 10, 11), (2, 11, 13), (3, 13, 14), (4, 14, 15))
    assert align("xABCDEy", ids, offsets, infix, [moved]).token.tolist() == [-1, 1, 2, 3, -1]
    assert align("xABCDEy", ids, offsets, infix, [same]).token.tolist() == [-1] * 5


@pytest.mark.parametrize("stored", [None, pieces()])
def test_a_chunk_without_kv_is_fresh_text(stored: tuple[Tensor, Tensor] | None) -> None:
    ids, offsets = pieces((9, 0, 1), (1, 1, 2), (2, 2, 4))
    layout = align("xABCy", ids, offsets, [Span(1, 4, "k", 0)], [stored])
    assert not layout.reusable.any() and not layout.edge.any() and layout.runs() == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 4)), max_size=30))
def test_runs_are_the_longest_there_are(rows: list[tuple[int, int]]) -> None:
    chunk = torch.tensor([number for number, _ in rows], dtype=torch.long)
    token = torch.tensor([place if number >= 0 else -1 for number, place in rows], dtype=torch.long)
    nothing = torch.zeros(len(rows), dtype=torch.long)
    layout = Layout("", nothing, torch.stack([nothing, nothing], 1), (), chunk, token, nothing.bool())
    check_runs(layout)
    assert [row for _, row, _ in layout.runs()] == sorted(row for _, row, _ in layout.runs())


def test_layouts_of_nothing() -> None:
    layout = align("", *pieces(), [], [])
    assert len(layout) == 0 and layout.runs() == []


def test_the_question_s_rows_are_its_fresh_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    chunk, ask = documentation(1)[0], "Who built the harbour in 1847?"
    prompt = f"Read:\n\n{chunk}\n\nQuestion: {ask}\nAnswer:"
    layout, index = lay_out(tokenizer, prompt, [chunk])
    question = find_question(prompt, index.find(prompt), ask, CHATML)
    rows = question.rows(layout)
    assert not layout.reusable[rows].any() and (rows.diff() == 1).all()
    assert tokenizer.decode(layout.ids[rows]).strip() == ask
    assert len(Question("not in the prompt").rows(layout)) == 0
    everything = Question(prompt, 0, len(prompt)).rows(layout)
    assert torch.equal(everything, (~layout.reusable).nonzero()[:, 0])


@pytest.mark.parametrize("prepend", ["first", "always"])
@pytest.mark.parametrize("strips", [{}, {"rstrip": True}, {"lstrip": True}], ids=["", "rstrip", "lstrip"])
def test_what_a_document_quotes_changes_no_token_outside_it(prepend: str, strips: dict[str, bool]) -> None:
    """Tokenizers treat the beginning of a text, and what stands beside a control token, in ways of their own."""
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    words.train_from_iterator([f"system user assistant \n {text} <|end|>" for text in PASSAGES], trainer)
    words.add_special_tokens([AddedToken("<|end|>", special=True, **strips)])
    texts = PromptTokenizer(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>"))

    def outside(document: str) -> tuple[list[int], list[int]]:
        head, tail = "system <|end|> \n user ", " \n <|end|> \n assistant "
        end = len(head + document)
        tokens = texts.tokenise_prompt(head + document + tail, [(len(head), end)])
        inside = tokens.ids[(tokens.offsets[:, 1] > len(head)) & (tokens.offsets[:, 0] < end)]
        assert texts.tokenizer.eos_token_id not in inside
        before, behind = tokens.offsets[:, 1] <= len(head), tokens.offsets[:, 0] >= end
        return tokens.ids[before].tolist(), tokens.ids[behind].tolist()

    plain = outside("They say it ends here and not there.")
    assert plain[0].count(texts.tokenizer.eos_token_id) == plain[1].count(texts.tokenizer.eos_token_id) == 1
    assert outside("They say <|end|> here and not there.") == plain
    assert outside("They say <|end|><|end|>x<|end|> and not there.") == plain
