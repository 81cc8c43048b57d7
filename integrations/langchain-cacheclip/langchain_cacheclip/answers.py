"""From a model's answer and its report to what LangChain's messages hold."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage, AIMessageChunk, InvalidToolCall, ToolCall, ToolCallChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata

if TYPE_CHECKING:
    from cacheclip_rag.frameworks.structured.calls import Parsed
    from cacheclip_rag.report import Report


def answer_message(model: str, parsed: Parsed, report: Report) -> AIMessage:
    """A whole answer."""
    return AIMessage(
        content=parsed.text,
        tool_calls=[ToolCall(name=c.name, args=c.arguments, id=c.id, type="tool_call") for c in parsed.calls],
        invalid_tool_calls=[
            InvalidToolCall(name=c.name, args=c.text, id=c.id, error=c.error, type="invalid_tool_call")
            for c in parsed.invalid
        ],
        usage_metadata=_usage(report),
        response_metadata=_metadata(model, parsed, report),
    )


def last_chunk(model: str, rest: Parsed, report: Report) -> AIMessageChunk:
    """The end of a streamed answer. Counts go into this chunk only, since LangChain adds up those of all."""
    calls: list[tuple[str | None, str, str]] = []
    calls += [(call.name, json.dumps(call.arguments, ensure_ascii=False), call.id) for call in rest.calls]
    calls += [(call.name, call.text, call.id) for call in rest.invalid]
    return AIMessageChunk(
        content=rest.text,
        tool_call_chunks=[
            ToolCallChunk(name=name, args=args, id=id_, index=index, type="tool_call_chunk")
            for index, (name, args, id_) in enumerate(calls)
        ],
        usage_metadata=_usage(report),
        response_metadata=_metadata(model, rest, report),
        chunk_position="last",
    )


def _usage(report: Report) -> UsageMetadata:
    """``input_tokens`` includes those from cache; of these, only what was not recomputed counts as read."""
    return UsageMetadata(
        input_tokens=report.prompt_tokens,
        output_tokens=report.completion_tokens,
        total_tokens=report.prompt_tokens + report.completion_tokens,
        input_token_details=InputTokenDetails(cache_read=report.cached_tokens),
    )


def _metadata(model: str, parsed: Parsed, report: Report) -> dict[str, Any]:
    """The names LangChain knows, and the report."""
    return {
        "model_name": model,
        "model_provider": "cacheclip",
        "finish_reason": "tool_calls" if parsed.calls else report.finish_reason,
        "cacheclip": report.as_dict(),
    }
