"""One call of the chat model: what it asks for of tools and formats, and what becomes of the answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.utils.function_calling import convert_to_json_schema

from cacheclip_rag.errors import ConfigurationError

from .grammar import Node, any_object, json_grammar
from .tools import CallReader, Dialect, Parsed, parse

if TYPE_CHECKING:
    from cacheclip_rag.engine import Engine
    from cacheclip_rag.report import Report


@dataclass(frozen=True)
class Request:
    """One call, ready for the engine. ``dialect``: how its model writes calls; None where no tools are offered."""

    engine: Engine
    model: str
    prompt: str
    options: dict[str, Any]
    dialect: Dialect | None
    tools: frozenset[str] = field(default_factory=frozenset)

    def parse(self, text: str) -> Parsed:
        return Parsed(text) if self.dialect is None else parse(self.dialect, text, self.tools)

    def reader(self) -> CallReader | None:
        return None if self.dialect is None else CallReader(self.dialect, self.tools)


def choice_of(choice: Any, tools: Sequence[dict[str, Any]]) -> str | None:
    """``"any"``, ``"none"``, a tool's name, or None. Raises `ConfigurationError` for anything else."""
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


def format_of(wanted: Any) -> tuple[Node, str]:
    """The grammar of a ``response_format`` and what the model is told about it. Raises `ConfigurationError`."""
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "json_object":
        return any_object(), ""
    if kind == "json_schema" and isinstance(described := wanted.get("json_schema"), dict):
        schema = described.get("schema", {})
        return json_grammar(
            schema
        ), f"Answer with JSON that follows this schema:\n{json.dumps(schema, ensure_ascii=False)}"
    raise ConfigurationError(
        'response_format must be {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": ...}}, '
        f"not {wanted!r}"
    )


def json_schema(schema: Any) -> dict[str, Any]:
    """The JSON schema of a pydantic model, a typed dict, a function, or of what is one already."""
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        described: dict[str, Any] = schema.model_json_schema()
        return described
    if isinstance(schema, dict) and "function" not in schema and "parameters" not in schema:
        return schema
    return convert_to_json_schema(schema)


def title_of(schema: Any) -> str:
    """What an answer of this shape is called."""
    return str(schema.get("title", "answer")) if isinstance(schema, dict) else getattr(schema, "__name__", "answer")


def usage_of(report: Report) -> UsageMetadata:
    """``input_tokens`` includes those from cache; of these, only what was not recomputed counts as read."""
    return UsageMetadata(
        input_tokens=report.prompt_tokens,
        output_tokens=report.completion_tokens,
        total_tokens=report.prompt_tokens + report.completion_tokens,
        input_token_details=InputTokenDetails(cache_read=report.cached_tokens),
    )


def metadata_of(model: str, report: Report, parsed: Parsed) -> dict[str, Any]:
    """An answer's ``response_metadata``: the names LangChain knows, and the report."""
    return {
        "model_name": model,
        "model_provider": "cacheclip",
        "finish_reason": "tool_calls" if parsed.calls else report.finish_reason,
        "cacheclip": report.as_dict(),
    }
