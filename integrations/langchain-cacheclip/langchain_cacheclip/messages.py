"""From LangChain's messages to the ones that chat templates take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError
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

if TYPE_CHECKING:
    from cacheclip_rag.model.backbone import Backbone


def render(backbone: Backbone, messages: Sequence[BaseMessage], tools: Sequence[dict[str, Any]] = ()) -> str:
    """The prompt, by the model's own chat template.

    Raises `PromptError` for a message that holds something other than text, and for a conversation that the template
    refuses.
    """
    written = [_written(message) for message in messages]
    try:
        return backbone.chat(written, tools=list(tools)) if tools else backbone.chat(written)
    except TemplateError as error:
        raise PromptError(f"the model's chat template refuses this conversation: {error}") from error


def with_instruction(backbone: Backbone, messages: Sequence[BaseMessage], instruction: str) -> list[BaseMessage]:
    """The messages with a sentence more in the system message, which is made if there is none; in front of the first
    question for a model whose chat template knows no such message.
    """
    if messages and isinstance(messages[0], SystemMessage):
        return [SystemMessage(f"{_text(messages[0])}\n\n{instruction}"), *messages[1:]]
    made = [SystemMessage(instruction), *messages]
    if messages and isinstance(messages[0], HumanMessage):
        try:
            render(backbone, [made[0], HumanMessage("")])
        except PromptError:
            return [HumanMessage(f"{instruction}\n\n{_text(messages[0])}"), *messages[1:]]
    return made


def _written(message: BaseMessage) -> dict[str, Any]:
    written: dict[str, Any] = {"role": _role(message), "content": _text(message)}
    if isinstance(message, AIMessage) and message.tool_calls:
        written["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["args"]}}
            for call in message.tool_calls
        ]
    if isinstance(message, ToolMessage):
        written.update(tool_call_id=message.tool_call_id)
        if message.name:
            written.update(name=message.name)
    return written


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return {"developer": "system", "human": "user", "ai": "assistant"}.get(message.role, message.role)
    for kind, role in (
        (HumanMessage, "user"),
        (AIMessage, "assistant"),
        (SystemMessage, "system"),
        (ToolMessage, "tool"),
        (FunctionMessage, "tool"),
    ):
        if isinstance(message, kind):
            return role
    raise PromptError(f"a {type(message).__name__} cannot be part of a prompt")


def _text(message: BaseMessage) -> str:
    """The message's text. What an answer holds beside it (tool calls, reasoning) is not said again."""
    if isinstance(message.content, str):
        return message.content
    pieces = []
    for block in message.content:
        if isinstance(block, str):
            pieces.append(block)
        elif block.get("type") == "text":
            pieces.append(str(block.get("text", "")))
        elif not isinstance(message, AIMessage):
            raise PromptError(f'the model reads text only, and a message holds a block of type "{block.get("type")}"')
    return "".join(pieces)
