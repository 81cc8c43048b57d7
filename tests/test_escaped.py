"""Documents that reach a prompt as a repr or as JSON, and prompts of which little can be reused."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny import PASSAGES, prompt_of, tiny_backbone

from cacheclip_rag import Engine
from cacheclip_rag.prompt import ChunkIndex, Layout, Span, escaped, outright
from cacheclip_rag.prompt.layout import OWN_RATIO, PASS_COST, RUN_COST

LINE = "The lighthouse at Cape Morrow was built in 1874 by the engineer Ada Lindqvist of Visby"
LONG = f'{LINE}, who "planned" it.\n{LINE[::-1]} — née\tin Zürich.\n\n{LINE.upper()}'
SHORT = "\n".join(f"line {number} of it" for number in range(12))


@dataclass
class Document:
    page_content: str
    metadata: dict[str, Any] = field(default_factory=dict)


def reason(prompt: str, *chunks: str) -> str | None:
    index = ChunkIndex()
    for number, chunk in enumerate(chunks):
        index.add(f"k{number}", chunk)
    return escaped(prompt, index.find(prompt), index.text)


@pytest.mark.parametrize("text", [LONG, SHORT])
@pytest.mark.parametrize(
    "write",
    [
        lambda docs: str(docs),
        lambda docs: json.dumps([vars(doc) for doc in docs]),
        lambda docs: json.dumps([vars(doc) for doc in docs], ensure_ascii=False),
        lambda docs: str([vars(doc) for doc in docs]),
    ],
    ids=["repr", "JSON", "JSON of any characters", "dicts"],
)
def test_documents_written_as_objects_are_noticed(text: str, write: Any) -> None:
    said = reason(f"Use this:\n{write([Document(text, {'source': 'a.txt'})])}\n\nWho?", text)
    assert said is not None and "page_content for doc in docs" in said


@pytest.mark.parametrize("write", [repr, json.dumps])
def test_escaped_text_is_noticed_without_the_objects_too(write: Any) -> None:
    assert reason(f"Use this:\n{write(LONG)}\n\nWho?", LONG) is not None
    head, tail = LONG[: len(LINE)], LONG[-len(LINE) :]
    assert reason(f"{write(LONG)[: -len(tail)]}", LONG) is not None, head


def test_other_prompts_have_nothing_to_warn_of() -> None:
    assert reason(f"Use this:\n{LONG}\n\n{SHORT}\n\nWho?", LONG, SHORT) is None
    assert reason("Who?", LONG) is None
    code = f"docs = [Document(page_content='one\\ntwo')]  # {LINE}\nprint('a\\n')  # {LINE}"
    assert reason(f"Use this:\n{code}\n\nWho?", code) is None, "a document that speaks of such objects"
    assert reason(f"{LINE} \\n and so on, {LINE}", LINE) is None, "a backslash of the prompt's own"
    assert reason("str(Document(page_content='one line'))", LONG) is None, "nothing is escaped there"


def test_looking_for_it_is_bounded() -> None:
    prompt = f"{LINE}\\n" * 20_000
    asked: list[str] = []
    spans = [Span(n * (len(LINE) + 2), n * (len(LINE) + 2) + len(LINE), "k0", 0) for n in range(20_000)]
    assert escaped(prompt, spans, lambda key: asked.append(key) or LINE) is None  # type: ignore[func-returns-value]
    assert len(asked) == 1000


# ---- prefilling outright -------------------------------------------------------------------------------------------


def layout_of(*pieces: tuple[int, int]) -> Layout:
    """Pieces of (tokens without, tokens with stored KV)."""
    token, row = [], 0
    for fresh, held in pieces:
        token += [-1] * fresh + list(range(row, row + held))
        row += held + 1
    tokens = torch.tensor(token)
    nothing = torch.zeros(len(token), dtype=torch.long)
    chunk = torch.where(tokens >= 0, 0, -1)
    return Layout("", nothing, torch.stack([nothing, nothing], 1), (), chunk, tokens, nothing.bool())


def test_a_prompt_is_prefilled_outright_when_reuse_gains_nothing() -> None:
    assert outright(layout_of((20, 400), (3, 300), (30, 0))) is None
    assert outright(layout_of((50, 0))) is None, "nothing to say where nothing is known"
    many = outright(layout_of(*[(20, RUN_COST)] * 30))
    assert many is not None and f"{30 * RUN_COST} of {600 + 30 * RUN_COST:,} tokens" in many and "30 pieces" in many
    assert outright(layout_of(*[(20, RUN_COST + 1)] * 30)) is None


def test_a_selection_that_computes_the_rest_twice_must_save_more_than_that() -> None:
    assert outright(layout_of((900, 600)), passes=1.0) is not None
    assert outright(layout_of((900, 600)), passes=0.5) is None
    assert outright(layout_of((300, 600)), passes=1.0) is None
    assert outright(layout_of((900, 600)), passes=1.0, prefix=200) is None, "200 of them are there"


def test_a_selection_s_pass_costs_something_however_few_its_tokens_are() -> None:
    assert outright(layout_of((600, PASS_COST)), passes=0.001) is not None
    assert outright(layout_of((600, PASS_COST + RUN_COST + 2)), passes=0.001) is None
    assert outright(layout_of((600, RUN_COST + 1))) is None, "without such a pass"
    assert outright(layout_of((90, 10)), passes=1.0) is None, "of a short prompt nothing is weighed"


def test_of_the_tokens_that_are_recomputed_those_of_methods_defaults_count() -> None:
    layout = layout_of((600, 2 * RUN_COST), (20, 2 * RUN_COST))
    assert outright(layout, passes=0.0, ratio=0.1) is None
    layout = layout_of((600, 5 * RUN_COST // 4))
    assert outright(layout, ratio=0.1) is None and outright(layout, ratio=OWN_RATIO) is not None
    assert outright(layout_of((600, 2 * RUN_COST)), ratio=0.99) is None, "who asks for so much wants it"


def test_missing_chunks_of_a_prompt_that_is_prefilled_in_full_are_encoded_again() -> None:
    ready = Engine(tiny_backbone(), method="query_guided")
    ready.ensure(PASSAGES)
    ready.library.store.delete([ready.library.key(text) for text in PASSAGES[1:]])
    first = ready.generate(prompt_of(ready, PASSAGES), max_new_tokens=1).report
    assert (
        any("full prefill" in reason for reason in first.fallbacks) and sum(bool(u.missing) for u in first.chunks) == 4
    )
    ready.flush()
    second = ready.generate(prompt_of(ready, PASSAGES), max_new_tokens=1).report
    assert second.fallbacks == [] and second.reused
