"""Where the question stands in a prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from .documents import any_of
from .index import Span
from .layout import Layout
from .rendered import Stretch, contents, joined, without

_LETTER = re.compile(r"[^\W_]")
"""A letter or a digit, of any script."""


@dataclass(frozen=True)
class Question:
    """The question's ``text`` and where it stands: characters ``[start, end)`` of the prompt, empty if it does not."""

    text: str
    start: int = 0
    end: int = 0

    def rows(self, layout: Layout) -> Tensor:
        """``[q]`` int64: the tokens without stored KV that it consists of."""
        inside = (layout.offsets[:, 0] < self.end) & (layout.offsets[:, 1] > self.start)
        return (inside & ~layout.reusable & ~layout.soft).nonzero()[:, 0]


def find_question(
    prompt: str, spans: Sequence[Span], known: str | None, control: Collection[str], closing: str = ""
) -> Question:
    """The question in a prompt: ``known`` where it stands outside the chunks, else what a reader would take for it.

    That is the text behind the last chunk, or, where nothing is there, the text before the first. Control tokens and
    the ``closing`` of the chat template ("assistant") are no question. Of a `RenderedPrompt` nothing is that the
    template wrote, and of its messages the last one behind the chunks is, or the one that the first chunk stands in.
    """
    own = contents(prompt)
    chunks = joined((span.start, span.end) for span in spans)
    gaps = without([(0, len(prompt))], chunks)
    if known and known.strip():
        known = known.strip()
        for start, end in [*reversed(without(own or (), chunks)), *reversed(gaps)]:
            if (stop := next(ends_of(known, prompt, start, end), None)) is not None:
                return Question(known, stop - len(known), stop)
        return Question(known)
    if own:
        return _of_messages(prompt, own, chunks)
    stop = len(prompt) - len(closing) if closing and prompt.endswith(closing) else len(prompt)
    pieces = [(spans[-1].end, stop), (0, spans[0].start)] if spans else [(0, stop)]
    pattern = any_of(control)
    for start, end in pieces:
        text = pattern.sub(" ", prompt[start:end]).strip()
        if _says(text):
            return Question(text, start, end)
    return _last_words(prompt)


def unquoted(prompt: str, spans: Sequence[Span], known: str | None, whole: Callable[[Span], bool]) -> list[Span]:
    """``spans`` without the parts of chunks that the ``known`` question quotes, so that all of it is computed.

    A question that holds a ``whole`` chunk is a prompt rather than a question, and keeps what it holds.
    """
    known = (known or "").strip()
    stop = next(ends_of(known, prompt, 0, len(prompt)), None) if known else None
    if stop is None:
        return list(spans)
    quoted = [span for span in spans if stop - len(known) <= span.start and span.end <= stop]
    return list(spans) if any(map(whole, quoted)) else [span for span in spans if span not in quoted]


def ends_of(part: str, text: str, start: int, end: int) -> Iterator[int]:
    """Where ``part`` ends in ``[start, end)`` of a text, the last place first.

    Backwards with `str.find`, since `str.rfind` takes the product of both lengths for text that repeats itself.
    """
    part, text = part[::-1], text[start:end][::-1]
    at = text.find(part)
    while at >= 0:
        yield end - at
        at = text.find(part, at + 1)


def _of_messages(prompt: str, own: Sequence[Stretch], chunks: Sequence[Stretch]) -> Question:
    pieces = [piece for piece in without(own, chunks) if _says(prompt[slice(*piece)])]
    first, last = (chunks[0][0], chunks[-1][1]) if chunks else (len(prompt), 0)
    behind, before = [p for p in pieces if p[0] >= last], [p for p in pieces if p[1] <= first]
    if behind or not before:
        pieces = behind[-1:]
    elif before[-1][1] == first:  # in the message that the first chunk stands in
        pieces = before[-1:]
    else:
        pieces = before
    if not pieces:
        return _last_words(prompt)
    text = "\n\n".join(prompt[start:end].strip() for start, end in pieces)
    return Question(text, pieces[0][0], pieces[-1][1])


def _says(text: str) -> bool:
    return _LETTER.search(text) is not None


def _last_words(prompt: str) -> Question:
    return Question(prompt[-256:].strip() or "?")
