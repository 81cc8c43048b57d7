"""The response format a caller asks for, as in OpenAI's API, which both frameworks follow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ...errors import ConfigurationError
from .grammar import Node, any_object, json_grammar


def choice_of(choice: Any, tools: Sequence[dict[str, Any]]) -> str | None:
    """A ``tool_choice`` as ``"any"``, ``"none"``, a tool's name, or None. Raises `ConfigurationError` for another."""
    given = choice
    if isinstance(choice, dict):  # {"function": {"name": ...}}, {"name": ...}, {"type": "any"}
        choice = choice.get("function", choice).get("name") or choice.get("type")
        if choice is None:
            raise ConfigurationError(f"tool_choice names neither a tool nor a type: {given!r}")
    if choice in (None, False, "auto"):
        return None
    if choice in (True, "any", "required"):
        return "any"
    names = [tool["function"]["name"] for tool in tools]
    if choice != "none" and choice not in names:
        raise ConfigurationError(f"tool_choice must be auto, any, none or one of {', '.join(names)}, not {choice!r}")
    return str(choice)


def schema_format(schema: dict[str, Any], name: str = "answer", **details: Any) -> dict[str, Any]:
    """The ``response_format`` that asks for JSON of this schema."""
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, **details}}


def format_of(wanted: Any) -> tuple[Node | None, str]:
    """The grammar of a ``response_format``, None for free text, and what the model is told about it. Raises
    `ConfigurationError`.

    ``"told": True`` beside the schema: the prompt holds the schema already.
    """
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if wanted is None or kind == "text":
        return None, ""
    if kind == "json_object":
        return any_object(), ""
    if kind == "json_schema" and isinstance(described := wanted.get("json_schema"), dict):
        schema = described.get("schema", {})
        written = json.dumps(schema, ensure_ascii=False)
        instruction = "" if described.get("told") else f"Answer with JSON that follows this schema:\n{written}"
        return json_grammar(schema), instruction
    raise ConfigurationError(
        'response_format must be {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": ...}}, '
        f"not {wanted!r}"
    )
