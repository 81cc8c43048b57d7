"""From LlamaIndex's messages and completions to a model's prompt."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock

from cacheclip_rag.errors import PromptError
from cacheclip_rag.integration import EngineHandle

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
        """Raises `PromptError` for a message that holds something other than text."""
        return self._handle.engine.backbone.chat(
            [{"role": _ROLES.get(m.role, m.role.value), "content": _text(m)} for m in messages]
        )


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
    for block in message.blocks:
        if not isinstance(block, TextBlock):
            raise PromptError(f"the model reads text only, and a message holds a {type(block).__name__}")
    return message.content or ""
