"""Recognises a prompt: its documents, its question, and which control tokens are plain text."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from .documents import documents, inside
from .index import ChunkIndex, Span
from .question import Question, find_question
from .rendered import Stretch, contents


class Frame(Protocol):
    """What recognition needs from a model's tokenizer and chat template (`PromptTokenizer`)."""

    @property
    def control_tokens(self) -> Collection[str]: ...
    @property
    def opening(self) -> str: ...
    @property
    def closing(self) -> str: ...


@dataclass(frozen=True)
class Recognised:
    """What is known of a prompt: its documents' ``spans``, and the stretches whose control tokens are ``text``, for
    `PromptTokenizer.tokenise_prompt`; ``question`` finds the question in it.
    """

    prompt: str
    spans: list[Span]
    text: list[Stretch]
    frame: Frame

    def question(self, known: str | None) -> Question:
        """See `find_question`."""
        closing = self.frame.closing if contents(self.prompt) is None else ""
        return find_question(self.prompt, self.spans, known, self.frame.control_tokens, closing)


def recognise(prompt: str, index: ChunkIndex, frame: Frame, hints: Collection[str] = ()) -> Recognised:
    """The documents in a prompt: known chunks and parts of them, the chat template's own text left out."""
    spans = index.find(prompt, hints)
    if contents(prompt) is None:
        control, opening, closing = frame.control_tokens, frame.opening, frame.closing
        left, right = inside(prompt, control, opening, closing)
        if right - left < len(prompt):
            opening, closing = prompt[:left], prompt[right:]
        quoted = [(left + start, left + end) for start, end in index.quoted(prompt[left:right])]
        spans = documents(prompt, spans, index.whole, control, opening, closing, quoted)
    else:  # it says itself what is text
        quoted = []
        spans = documents(prompt, spans, index.whole, ())
    return Recognised(prompt, spans, [*((span.start, span.end) for span in spans), *quoted], frame)
