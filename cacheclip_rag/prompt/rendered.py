"""A prompt rendered from messages: which of its characters are the messages' own, and which the chat template added."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Stretch = tuple[int, int]
"""Characters ``[start, end)`` of a prompt."""


class RenderedPrompt(str):
    """A prompt together with its ``contents``: the characters that came from messages, disjoint and in order.

    Control tokens inside contents are text, whoever wrote them; those outside are the chat template's. It is a string
    like any other, and what is made of it (a concatenation, a slice) is a plain one that knows no contents. Who renders
    prompts by other means can make one: ``RenderedPrompt(text, [(start, end), ...])``.
    """

    contents: tuple[Stretch, ...]

    def __new__(cls, text: str, contents: Iterable[Stretch] = ()) -> RenderedPrompt:
        self = super().__new__(cls, text)
        self.contents = tuple(joined((max(0, start), min(end, len(text))) for start, end in contents))
        return self

    def __getnewargs__(self) -> tuple[str, tuple[Stretch, ...]]:  # type: ignore[override]
        return str.__str__(self), self.contents


def contents(prompt: str) -> tuple[Stretch, ...] | None:
    """The characters of a prompt that messages brought; None for a finished prompt, of which nobody said."""
    return prompt.contents if isinstance(prompt, RenderedPrompt) else None


def joined(stretches: Iterable[Stretch]) -> list[Stretch]:
    """The same characters in disjoint stretches, in order; those that touch become one, since what is written across
    their border is as much of the same origin.
    """
    result: list[Stretch] = []
    for start, end in sorted(stretches):
        if end <= start:
            continue
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def rearranged(prompt: str, pieces: Iterable[Stretch]) -> str:
    """These pieces of a prompt, joined; the contents of a `RenderedPrompt` stay contents."""
    pieces = list(pieces)
    text = "".join(prompt[start:end] for start, end in pieces)
    if (own := contents(prompt)) is None:
        return text
    moved, at = [], 0
    for start, end in pieces:
        moved += [(at + max(a, start) - start, at + min(b, end) - start) for a, b in own if a < end and b > start]
        at += end - start
    return RenderedPrompt(text, moved)


def without(stretches: Sequence[Stretch], taken: Sequence[Stretch]) -> list[Stretch]:
    """What remains of ``stretches`` where ``taken`` is cut out; both disjoint and in order."""
    result, at = [], 0
    for start, end in stretches:
        while at < len(taken) and taken[at][1] <= start:
            at += 1
        number = at
        while number < len(taken) and taken[number][0] < end:
            if taken[number][0] > start:
                result.append((start, taken[number][0]))
            start = max(start, taken[number][1])
            number += 1
        if start < end:
            result.append((start, end))
    return result
