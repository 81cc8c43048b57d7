"""How a model writes tool calls, found by rendering one with its chat template, not by the model's name."""

from __future__ import annotations

import json
import re
import threading
import uuid
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

if TYPE_CHECKING:
    from ...model.backbone import Backbone

_NAME, _PARAMETER, _VALUE, _TEXT = "probe_function", "probe_parameter", "probe value", "probe answer"
_decoder = json.JSONDecoder()


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
        if name is not None and (item == wanted or (isinstance(item, str) and loaded(item) == wanted)):
            return name, key, isinstance(item, str)
    return None


def _plain(backbone: Backbone, text: str) -> str:
    for token in backbone.control_tokens:
        text = text.replace(token, "")
    return text


def loaded(text: str) -> Any:
    """What a text is as JSON; None for one that is not."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def call_id() -> str:
    """Nine letters and digits: Mistral's templates accept no others."""
    return uuid.uuid4().hex[:9]
