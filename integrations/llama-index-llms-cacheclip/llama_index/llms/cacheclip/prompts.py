"""From LlamaIndex's messages and completions to a model's prompt."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2.exceptions import TemplateError
from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock

from cacheclip_rag.errors import PromptError
from cacheclip_rag.frameworks import EngineHandle

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}  # the others go by the names that chat templates use


class ChatTemplate:
    """``messages_to_prompt`` by the model's own chat template."""

    def __init__(self, handle: EngineHandle) -> None:
        self._handle = handle

    def __call__(self, messages: Sequence[ChatMessage]) -> str:
        """Raises `PromptError` for a message that holds something other than text, and for a conversation that the
        template refuses.
        """
        written = [{"role": _ROLES.get(m.role, m.role.value), "content": _text(m)} for m in messages]
        try:
            return self._handle.engine.backbone.chat(written)
        except TemplateError as error:
            raise PromptError(f"the model's chat template refuses this conversation: {error}") from error


class UserTurn:
    """``completion_to_prompt``: one user message for a model with a chat template, the bare text for another."""

    def __init__(self, handle: EngineHandle) -> None:
        self._handle = handle

    def __call__(self, prompt: str) -> str:
        backbone = self._handle.engine.backbone
        if not backbone.tokenizer.chat_template:
            return prompt
        return backbone.chat([{"role": "user", "content": prompt}])


def _text(message: ChatMessage) -> str:
    """The message's text. What an answer holds beside it (tool calls, reasoning) is not said again."""
    answer = _ROLES.get(message.role, message.role.value) == "assistant"
    for block in message.blocks:
        if not isinstance(block, TextBlock) and not answer and type(block).__name__ != "CachePoint":
            raise PromptError(f"the model reads text only, and a message holds a {type(block).__name__}")
    return message.content or ""
