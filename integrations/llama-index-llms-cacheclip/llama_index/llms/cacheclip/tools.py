"""Tools and tool calls between LlamaIndex and a model's chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, TextBlock, ToolCallBlock
from llama_index.core.llms.llm import ToolSelection

from cacheclip_rag.frameworks.structured.dialect import loaded

if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool

    from cacheclip_rag.frameworks.structured.calls import Call


def offered(tools: Iterable[BaseTool | dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools by their JSON schemas."""
    return [tool if isinstance(tool, dict) else tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools]


def answer_message(text: str, calls: Sequence[Call]) -> ChatMessage:
    """An answer with its tool calls, in both places where LlamaIndex looks for them."""
    if not calls:
        return ChatMessage(role=MessageRole.ASSISTANT, content=text)
    blocks = [TextBlock(text=text)] if text else []
    written = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in calls
    ]
    return ChatMessage(
        role=MessageRole.ASSISTANT,
        blocks=[*blocks, *[ToolCallBlock(tool_call_id=c.id, tool_name=c.name, tool_kwargs=c.arguments) for c in calls]],
        additional_kwargs={"tool_calls": written},
    )


def tool_calls(message: ChatMessage) -> list[tuple[str | None, str, Any]]:
    """The id, the tool's name and the arguments of each call in a message: those in its blocks, or, as older models of
    LlamaIndex write them, beside these.
    """
    blocks = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    if blocks:
        return [(block.tool_call_id, block.tool_name, _arguments(block.tool_kwargs)) for block in blocks]
    calls = [call for call in message.additional_kwargs.get("tool_calls") or () if isinstance(call, dict)]
    functions = [(call.get("id"), call.get("function") or {}) for call in calls]
    return [(id_, function.get("name", ""), _arguments(function.get("arguments", {}))) for id_, function in functions]


def selections(response: ChatResponse, error_on_no_tool_call: bool) -> list[ToolSelection]:
    """What LlamaIndex's agents and programs make of an answer. Raises ValueError, which they expect, for no call."""
    calls = tool_calls(response.message)
    if not calls and error_on_no_tool_call:
        raise ValueError(f"the model called no tool, but answered: {response.message.content!r}")
    return [ToolSelection(tool_id=id_ or "", tool_name=name, tool_kwargs=arguments) for id_, name, arguments in calls]


def _arguments(given: Any) -> Any:
    """Templates and tools want an object, also where LlamaIndex has its JSON."""
    return (loaded(given) or given) if isinstance(given, str) else given
