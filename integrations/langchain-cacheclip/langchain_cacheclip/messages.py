"""From LangChain's messages to the ones that chat templates take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from cacheclip_rag.errors import PromptError
from cacheclip_rag.frameworks.messages import check_text_only, message

_ROLES = (
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (SystemMessage, "system"),
    (ToolMessage, "tool"),
    (FunctionMessage, "tool"),
)


def conversation(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Raises `PromptError` for a message that holds something other than text, or that is no part of a prompt."""
    return [_written(message) for message in messages]


def _written(given: BaseMessage) -> dict[str, Any]:
    role = _role(given)
    calls = given.tool_calls if isinstance(given, AIMessage) else ()
    return message(
        role,
        _text(given, role),
        calls=[(call["id"], call["name"], call["args"]) for call in calls],
        tool_call_id=given.tool_call_id if isinstance(given, ToolMessage) else None,
        name=given.name if isinstance(given, ToolMessage) else None,
    )


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES:
        if isinstance(message, kind):
            return role
    raise PromptError(f"a {type(message).__name__} cannot be part of a prompt")


def _text(message: BaseMessage, role: str) -> str:
    if isinstance(message.content, str):
        return message.content
    blocks = [{"type": "text", "text": block} if isinstance(block, str) else block for block in message.content]
    check_text_only(role, (str(block.get("type")) for block in blocks if block.get("type") != "text"))
    return "".join(str(block.get("text", "")) for block in blocks if block.get("type") == "text")
