"""Tool calls as a model's own chat template writes them: found out by rendering one, not by the model's name."""

from __future__ import annotations

import json
import re
import threading
import uuid
import weakref
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError
from langchain_core.messages import InvalidToolCall, ToolCall, ToolCallChunk

if TYPE_CHECKING:
    from cacheclip_rag.model.backbone import Backbone

_NAME, _PARAMETER, _VALUE, _TEXT = "probe_function", "probe_parameter", "probe value", "probe answer"
_decoder = json.JSONDecoder()
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_JSON_BEGINS = re.compile(r"(?:```(?:json)?\s*)?[\[{]")
_JSON_MAY_BEGIN = re.compile(r"`{0,3}|```j?s?o?|```(?:json)?\s*")


@dataclass(frozen=True)
class Dialect:
    """How a model writes a tool call: ``opening {"name_key": name, "arguments_key": {...}} closing``.

    ``opening`` and ``closing`` are without control tokens, which are not part of an answer's text.
    ``arguments_as_text``: the arguments are a string that holds JSON.
    """

    opening: str
    closing: str
    name_key: str
    arguments_key: str
    arguments_as_text: bool = False

    @property
    def mark(self) -> str:
        """What tells a call from prose, or "" for a model that writes bare JSON."""
        mark = self.opening.strip()
        return mark if sum(character.isalpha() for character in mark) >= 3 else ""


@dataclass
class Parsed:
    """An answer's ``text`` and the calls in it."""

    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    invalid: list[InvalidToolCall] = field(default_factory=list)

    @property
    def chunks(self) -> list[ToolCallChunk]:
        """The calls as a stream carries them."""
        calls: list[tuple[str | None, str | None, str | None]] = []
        calls += [(call["name"], json.dumps(call["args"], ensure_ascii=False), call["id"]) for call in self.calls]
        calls += [(call["name"], call["args"], call["id"]) for call in self.invalid]
        return [
            ToolCallChunk(name=name, args=args, id=id_, index=index, type="tool_call_chunk")
            for index, (name, args, id_) in enumerate(calls)
        ]


_dialects: weakref.WeakKeyDictionary[Backbone, Dialect | None] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def dialect_of(backbone: Backbone) -> Dialect | None:
    """How this model writes tool calls, or None for one whose chat template has none that can be read."""
    with _lock:
        if backbone not in _dialects:
            try:
                _dialects[backbone] = _probe(backbone)
            except (TemplateError, TypeError, ValueError, KeyError, AttributeError):  # the template takes no such thing
                _dialects[backbone] = None
        return _dialects[backbone]


def _probe(backbone: Backbone) -> Dialect | None:
    if not backbone.tokenizer.chat_template:
        return None
    parameters = {"type": "object", "properties": {_PARAMETER: {"type": "string"}}, "required": [_PARAMETER]}
    function = {"name": _NAME, "description": "", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    call = {"id": call_id(), "type": "function", "function": {"name": _NAME, "arguments": {_PARAMETER: _VALUE}}}
    user = {"role": "user", "content": "?"}
    asked = backbone.chat([user], tools=tools)
    if _NAME not in asked:
        return None
    said = backbone.chat([user, {"role": "assistant", "content": _TEXT}], tools=tools)
    called = backbone.chat([user, {"role": "assistant", "content": "", "tool_calls": [call]}], tools=tools)
    differs = (at for at, (a, b) in enumerate(zip(said, called, strict=False)) if a != b)
    start = next(differs, min(len(said), len(called)))
    tail = said[said.rindex(_TEXT) + len(_TEXT) :]
    stop = len(called) - len(tail) if called.endswith(tail) else len(called)
    for match in re.finditer(r"\{", called[start:stop]):
        try:
            value, end = _decoder.raw_decode(called, start + match.start())
        except ValueError:
            continue
        keys = _keys(value)
        if keys is not None:
            opening = _plain(backbone, called[start : start + match.start()])
            return Dialect(opening, _plain(backbone, called[end:stop]), *keys)
    return None


def _keys(value: Any) -> tuple[str, str, bool] | None:
    """Under which keys a rendered call has its name and its arguments, and whether these are a text."""
    wanted = {_PARAMETER: _VALUE}
    name = next((key for key, item in value.items() if item == _NAME), None)
    for key, item in value.items():
        if name is not None and (item == wanted or (isinstance(item, str) and _loaded(item) == wanted)):
            return name, key, isinstance(item, str)
    return None


def _plain(backbone: Backbone, text: str) -> str:
    for token in backbone.control_tokens:
        text = text.replace(token, "")
    return text


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def call_id() -> str:
    """Nine letters and digits: Mistral's templates accept no others."""
    return uuid.uuid4().hex[:9]


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
    values = _loaded(fenced.group(1) if fenced else answer.strip())
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
            arguments = _loaded(arguments)
        if isinstance(name, str) and isinstance(arguments, dict):
            parsed.calls.append(ToolCall(name=name, args=arguments, id=call_id(), type="tool_call"))
        else:
            text = dialect.mark + json.dumps([call], ensure_ascii=False)
            parsed.invalid.append(_invalid(name, text, "no name with an object of arguments"))


def _invalid(name: Any, text: str, error: str) -> InvalidToolCall:
    """``text`` is nothing that reads as an object: LangChain makes a call of every piece of a stream that does."""
    name = name if isinstance(name, str) else None
    return InvalidToolCall(name=name, args=text, id=call_id(), error=error, type="invalid_tool_call")


class CallReader:
    """Tells text from tool calls while an answer comes in.

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
