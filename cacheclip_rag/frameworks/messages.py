"""Chat messages as chat templates take them: roles, texts, tool calls, and errors for what a template refuses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from ..errors import PromptError

if TYPE_CHECKING:
    from ..model.backbone import Backbone

ROLES = {
    "ai": "assistant",
    "chatbot": "assistant",
    "developer": "system",
    "function": "tool",
    "human": "user",
    "model": "assistant",
}
"""The roles that chat templates know, by what frameworks call them; the others go by the templates' names."""


def message(
    role: str,
    text: str,
    *,
    calls: Iterable[tuple[str | None, str, Any]] = (),
    tool_call_id: str | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """One message. ``calls``: the id, the tool's name and the arguments of each tool call in it. ``tool_call_id`` and
    ``name``: of the call that a tool's message answers.
    """
    written: dict[str, Any] = {"role": ROLES.get(role, role), "content": text}
    called = [
        {"id": id_, "type": "function", "function": {"name": tool, "arguments": arguments}}
        for id_, tool, arguments in calls
    ]
    if called:
        written["tool_calls"] = called
    if tool_call_id is not None:
        written["tool_call_id"] = tool_call_id
    if name:
        written["name"] = name
    return written


def check_text_only(role: str, blocks: Iterable[str]) -> None:
    """Raises `PromptError` for types of ``blocks`` other than text. What an answer holds beside its text (tool calls,
    reasoning) is no error, and is not said again.
    """
    for block in blocks:
        if ROLES.get(role, role) != "assistant":
            raise PromptError(f'the model reads text only, and a message holds a block of type "{block}"')


def render(backbone: Backbone, messages: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> str:
    """The prompt, by the model's own chat template. Raises `PromptError` for a conversation that it refuses."""
    written = [dict(message) for message in messages]
    try:
        return backbone.chat(written, tools=list(tools)) if tools else backbone.chat(written)
    except TemplateError as error:
        raise PromptError(f"the model's chat template refuses this conversation: {error}") from error


def render_text(backbone: Backbone, text: str) -> str:
    """The prompt of one user message; the bare text for a model without a chat template."""
    return render(backbone, [message("user", text)]) if backbone.tokenizer.chat_template else text


def with_instruction(
    backbone: Backbone, messages: Sequence[Mapping[str, Any]], instruction: str
) -> list[Mapping[str, Any]]:
    """The messages with a sentence more in the system message, which is made if there is none; in front of the first
    question for a model whose chat template knows no such message.
    """
    first = messages[0] if messages else {"role": "", "content": ""}
    if first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{instruction}"}, *messages[1:]]
    made = message("system", instruction)
    if first["role"] == "user":
        try:
            render(backbone, [made, message("user", "")])
        except PromptError:
            return [{**first, "content": f"{instruction}\n\n{first['content']}"}, *messages[1:]]
    return [made, *messages]
