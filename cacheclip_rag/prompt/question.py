"""Where the question stands in a prompt."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from .documents import any_of
from .index import Span
from .layout import Layout


@dataclass(frozen=True)
class Question:
    """The question's ``text`` and where it stands: characters ``[start, end)`` of the prompt, empty if it does not."""

    text: str
    start: int = 0
    end: int = 0

    def rows(self, layout: Layout) -> Tensor:
        """``[q]`` int64: the tokens without stored KV that it consists of."""
        inside = (layout.offsets[:, 0] < self.end) & (layout.offsets[:, 1] > self.start)
        return (inside & ~layout.reusable).nonzero()[:, 0]


def find_question(
    prompt: str, spans: Sequence[Span], known: str | None, control: Collection[str], closing: str = ""
) -> Question:
    """The question in a prompt: ``known`` where it stands outside the chunks, else what a reader would take for it.

    That is the text behind the last chunk, or, where nothing is there, the text before the first. Control tokens and
    the ``closing`` of the chat template ("assistant") are no question.
    """
    if known and known.strip():
        known = known.strip()
        at = prompt.rfind(known)
        while at >= 0 and any(at < span.end and at + len(known) > span.start for span in spans):
            at = prompt.rfind(known, 0, at + len(known) - 1)
        return Question(known, at, at + len(known)) if at >= 0 else Question(known)
    stop = len(prompt) - len(closing) if closing and prompt.endswith(closing) else len(prompt)
    pieces = [(spans[-1].end, stop), (0, spans[0].start)] if spans else [(0, stop)]
    pattern = any_of(control)
    for start, end in pieces:
        text = pattern.sub(" ", prompt[start:end]).strip()
        if any(character.isalnum() for character in text):
            return Question(text, start, end)
    return Question(prompt[-256:].strip() or "?")
