"""Renders chat messages with the model's chat template, and says which characters came from the messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from ..chunks import MIN_CHARS
from ..errors import PromptError
from ..prompt import RenderedPrompt
from ..prompt.rendered import Stretch

Render = Callable[[list[dict[str, Any]], dict[str, Any]], str]

_PRIVATE = re.compile("[\U000f0000-\U0010fffd]")
"""Characters for private use, which no filter of a template changes."""

_PLAIN = ("role", "type")
"""Fields of messages that say what something is. Templates compare them, and nobody writes text there."""

_DATE = {
    "a": "Fri", "A": "Friday", "w": "5", "u": "5", "d": "26", "e": "26", "j": "208", "b": "Jul", "h": "Jul",
    "B": "July", "m": "07", "y": "24", "g": "24", "Y": "2024", "G": "2024", "C": "20", "U": "29", "W": "30", "V": "30",
    "H": "00", "k": " 0", "I": "12", "l": "12", "M": "00", "S": "00", "f": "000000", "p": "AM", "P": "am", "z": "",
    "Z": "", "s": "1721952000", "c": "Fri Jul 26 00:00:00 2024", "x": "07/26/24", "D": "07/26/24", "F": "2024-07-26",
    "X": "00:00:00", "T": "00:00:00", "R": "00:00", "r": "12:00:00 AM", "n": r"\n", "t": r"\t", "%": "%",
}  # fmt: skip
"""The day that Llama's templates fall back to, in every directive of strftime, whatever clock, zone and locale say."""


def pinned(template: str) -> str:
    """The chat template with its clock stopped: `strftime_now`, transformers' only function that tells the time, always
    gives the same moment. A macro does it, since transformers makes text of a function that is handed to a template.
    """
    directives = {f"%{name}": value for name, value in _DATE.items() if name != "%"}
    directives |= {f"%-{name}": value.lstrip("0 ") or "0" for name, value in _DATE.items() if value.strip().isdigit()}
    chain = "".join(f"|replace('{directive}', '{value}')" for directive, value in directives.items())
    macro = f"{{% macro strftime_now(format) %}}{{{{ format{chain}|replace('%%', '%') }}}}{{% endmacro %}}\n"
    return macro + template  # the newline goes with the block before it, and the template begins on a line of its own


def chat(
    render: Render,
    quotes: Callable[[str], bool],
    control: Callable[[str], Sequence[Stretch]],
    messages: list[dict[str, Any]],
    options: dict[str, Any],
) -> RenderedPrompt:
    """The prompt for ``messages``, with the characters that come from them (and from tools) as its contents.

    It is rendered a second time with a mark before and behind each text, a character that occurs nowhere else. A
    template may look at what it is given (Qwen3's does at how a message begins), and then the marks change more than
    themselves: fewer texts are marked at a time, then one at one side, and those that cannot be are looked for.
    ``quotes`` tells whether a text holds a control token, ``control`` where: of contents all are marked, of other
    fields (a tool's description) those that do, and in both each such token as well, for a template may take a text to
    pieces.
    """
    prompt = render(messages, options)
    texts = _Marks(prompt, quotes, control).texts(messages, options)
    if not texts:
        return RenderedPrompt(prompt)
    found: dict[int, list[Stretch]] = {}
    groups = [range(len(texts))]
    while groups:
        numbers = groups.pop()
        for sides in ((True, True),) if len(numbers) > 1 else ((True, True), (False, True), (True, False)):
            marks = _Marks(prompt, quotes, control, set(numbers), sides)
            marked = render([marks.message(message) for message in messages], marks.options(options))
            if (places := _read(marked, marks, prompt, control)) is not None:
                found |= places
                break
        else:
            groups += [numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]] if len(numbers) > 1 else []
    if len(found) < len(texts):
        for number, text in enumerate(texts):
            if number not in found:
                before = max((e for n, places in found.items() if n < number for _, e in places), default=0)
                behind = min((s for n, places in found.items() if n > number for s, _ in places), default=len(prompt))
                found[number] = _places(prompt, text, before, behind, quotes(text))
    return RenderedPrompt(prompt, (place for places in found.values() for place in places))


def _read(
    marked: str, marks: _Marks, prompt: str, written: Callable[[str], Sequence[Stretch]]
) -> dict[int, list[Stretch]] | None:
    """By its number, where each marked text stands in the prompt; None where the marks changed more than themselves."""
    found: dict[int, list[Stretch]] = {number: [] for number, _, _ in marks.numbers.values()}
    opened: dict[tuple[int, bool], int] = {}
    pieces: list[str] = []
    at = last = 0
    cut: list[tuple[int, int, bool]] = []  # texts of which the template left out one end
    for match in _PRIVATE.finditer(marked):
        if match[0] not in marks.numbers:
            continue
        pieces.append(marked[last : match.start()])
        last = match.end()
        at += len(pieces[-1])
        number, inner, opens = marks.numbers[match[0]]
        if opens:
            opened[number, inner] = at
        elif (number, inner) in opened:
            found[number].append((opened.pop((number, inner)), at))
        elif not inner:
            cut.append((number, at, True))
    if "".join([*pieces, marked[last:]]) != prompt:
        return None
    cut += [(number, start, False) for (number, inner), start in opened.items() if not inner]
    control = written(prompt) if cut else ()
    for number, at, ends in cut:  # and it may have written something like it instead
        text = marks.written[number]
        if ends:
            start = at - _alike(prompt[max(0, at - len(text)) : at][::-1], text[::-1])
            found[number].append((max([start, *(b for a, b in control if a < start < b)]), at))
        else:
            end = at + _alike(prompt[at : at + len(text)], text)
            found[number].append((at, min([end, *(a for a, b in control if a < end < b)])))
    return found


def _alike(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _places(prompt: str, text: str, start: int, end: int, quotes: bool) -> list[Stretch]:
    """Where a text stands that could not be marked, between those before and behind it, else anywhere.

    Raises `PromptError` for one that holds control tokens and is not found: they could not be told from the template's.
    """
    if not quotes and len(text) < MIN_CHARS:
        return []  # nothing depends on it
    for left, right in ((start, end), (0, len(prompt))):
        places = [match.span() for match in re.finditer(re.escape(text), prompt[left:right])]
        if places:
            return [(left + a, left + b) for a, b in places]
    if quotes:
        raise PromptError(
            "a message holds control tokens, and the chat template changes it so that they cannot be told from its own"
        )
    return []


class _Marks:
    """A few characters for each text of a conversation that occur nowhere in the prompt."""

    def __init__(
        self,
        prompt: str,
        quotes: Callable[[str], bool],
        control: Callable[[str], Sequence[Stretch]],
        wanted: set[int] | None = None,
        sides: tuple[bool, bool] = (True, True),
    ) -> None:
        self._quotes, self._control, self._wanted, self._sides = quotes, control, wanted, sides
        self._characters = self._unused(prompt)
        self._seen = count()
        self.written: dict[int, str] = {}
        self.numbers: dict[str, tuple[int, bool, bool]] = {}

    def texts(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[str]:
        """All texts that would be marked, by their numbers."""
        for message in messages:
            self.message(message)
        self.options(options)
        return [self.written[number] for number in sorted(self.written)]

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value if name in _PLAIN else self._value(value, name == "content") for name, value in message.items()
        }

    def options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._value(value, False) for name, value in options.items()}

    def _value(self, value: Any, content: bool) -> Any:
        if isinstance(value, str):
            return self._text(value, content)
        if isinstance(value, Mapping):
            return {
                self._text(name, False) if isinstance(name, str) else name: inner
                if name in _PLAIN
                else self._value(inner, content)
                for name, inner in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._value(inner, content) for inner in value]
        return value

    def _text(self, text: str, content: bool) -> str:
        """Marked within the blanks around it, which templates trim, and around each control token in it."""
        core = text.strip()
        if not core or not (content or self._quotes(text)):
            return text
        number = next(self._seen)
        self.written[number] = core
        if self._wanted is not None and number not in self._wanted:
            return text
        start, last, pieces = text.index(core), 0, []
        if written := self._control(core) if self._quotes(core) else ():
            opening, closing = self._mark(number, True, True), self._mark(number, True, False)
            for begin, end in written:
                pieces += [core[last:begin], opening, core[begin:end], closing]
                last = end
        opening, closing = (
            self._mark(number, False, opens) if side else ""
            for opens, side in zip((True, False), self._sides, strict=True)
        )
        return "".join([text[:start], opening, *pieces, core[last:], closing, text[start + len(core) :]])

    def _mark(self, number: int, inner: bool, opens: bool) -> str:
        mark = next(self._characters)
        self.numbers[mark] = number, inner, opens
        return mark

    @staticmethod
    def _unused(prompt: str) -> Iterator[str]:
        used = set(prompt)
        return (c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in used)
