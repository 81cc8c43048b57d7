"""Parses the tool calls in an answer, complete or streamed, and separates them from its text."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from .dialect import Dialect, call_id, loaded

_decoder = json.JSONDecoder()
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_JSON_BEGINS = re.compile(r"(?:```(?:json)?\s*)?[\[{]")
_JSON_MAY_BEGIN = re.compile(r"`{0,3}|```j?s?o?|```(?:json)?\s*")


@dataclass(frozen=True)
class Call:
    """A parsed tool call."""

    name: str
    arguments: dict[str, Any]
    id: str


@dataclass(frozen=True)
class InvalidCall:
    """A tool call that cannot be read, as the model wrote it. ``text`` begins with the mark of a call, or is a list:
    nothing that reads as an object, which some frameworks would make a call of.
    """

    name: str | None
    text: str
    id: str
    error: str


@dataclass
class Parsed:
    """An answer's ``text`` and the calls in it."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)
    invalid: list[InvalidCall] = field(default_factory=list)


def parse(dialect: Dialect, answer: str, names: Collection[str]) -> Parsed:
    """The tool calls in an answer, and the text around them. ``names``: of the tools that may be called.

    An answer that is JSON throughout and names a tool is a call, whatever the template says: small models
    (Qwen2.5-Coder) tend to leave the mark out, and to put a code fence there.
    """
    bare = _parse_bare(dialect, answer, names)
    if bare is not None:
        return bare
    if not dialect.mark:
        return Parsed(answer)
    parsed, position = Parsed(), 0
    while (at := answer.find(dialect.mark, position)) >= 0:
        parsed.text += answer[position:at].rstrip()
        begin = at + len(dialect.mark)
        begin += len(answer[begin:]) - len(answer[begin:].lstrip())
        try:
            value, position = _decoder.raw_decode(answer, begin)
        except ValueError as error:
            closing = dialect.closing.strip()
            end = answer.find(closing, begin) if closing else -1
            position = len(answer) if end < 0 else end
            parsed.invalid.append(_invalid(None, dialect.mark + answer[begin:position], str(error)))
        else:
            _take(dialect, value, parsed)
        rest = answer[position:].lstrip()
        if dialect.closing.strip() and rest.startswith(dialect.closing.strip()):
            position = len(answer) - len(rest) + len(dialect.closing.strip())
    rest = answer[position:]
    parsed.text += rest if rest.strip() or not position else ""
    return parsed


def _parse_bare(dialect: Dialect, answer: str, names: Collection[str]) -> Parsed | None:
    fenced = _FENCED.fullmatch(answer.strip())
    values = loaded(fenced.group(1) if fenced else answer.strip())
    values = values if isinstance(values, list) else [values]
    for value in values:
        name = value.get(dialect.name_key) if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in names or dialect.arguments_key not in value:
            return None
    if not values:
        return None
    parsed = Parsed()
    for value in values:
        _take(dialect, value, parsed)
    return parsed


def _take(dialect: Dialect, value: Any, parsed: Parsed) -> None:
    for call in value if isinstance(value, list) else [value]:
        name = call.get(dialect.name_key) if isinstance(call, dict) else None
        arguments = call.get(dialect.arguments_key, {}) if isinstance(call, dict) else None
        if isinstance(arguments, str):
            arguments = loaded(arguments)
        if isinstance(name, str) and isinstance(arguments, dict):
            parsed.calls.append(Call(name, arguments, call_id()))
        else:
            text = dialect.mark + json.dumps([call], ensure_ascii=False)
            parsed.invalid.append(_invalid(name, text, "no name with an object of arguments"))


def _invalid(name: Any, text: str, error: str) -> InvalidCall:
    return InvalidCall(name if isinstance(name, str) else None, text, call_id(), error)


class CallReader:
    """Separates text from tool calls in a streamed answer.

    Text goes on at once; calls, and an answer that begins as JSON does, are kept back to the end.
    """

    def __init__(self, dialect: Dialect, names: Collection[str]) -> None:
        self._dialect, self._names = dialect, names
        self._kept = ""
        self._calling = self._speaking = False

    def feed(self, delta: str) -> str:
        """What of the answer is certainly text."""
        self._kept += delta
        if self._calling:
            return ""
        mark, text = self._dialect.mark, self._kept
        if not self._speaking and _JSON_BEGINS.match(text.lstrip()):
            self._calling = True
            return ""
        if not self._speaking and _JSON_MAY_BEGIN.fullmatch(text.lstrip()):
            return ""
        if mark and mark in text:
            self._calling = True
            ready = len(text[: text.index(mark)].rstrip())
        else:
            held = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
            ready = len(text[: len(text) - held].rstrip())  # blanks before a call are no text
        self._speaking = self._speaking or ready > 0
        self._kept = text[ready:]
        return text[:ready]

    def close(self) -> Parsed:
        """What is left, once the answer is complete."""
        return parse(self._dialect, self._kept, self._names)
