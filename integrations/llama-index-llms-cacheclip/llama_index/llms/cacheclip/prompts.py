"""From LlamaIndex's messages and completions to a model's prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, TextBlock, ToolCallBlock

from cacheclip_rag.frameworks import EngineHandle
from cacheclip_rag.frameworks.messages import check_text_only, message, render, render_text

from .tools import tool_calls


class ChatTemplate:
    """``messages_to_prompt`` by the model's own chat template."""

    def __init__(self, handle: EngineHandle) -> None:
        self._handle = handle

    def __call__(self, messages: Sequence[ChatMessage]) -> str:
        """Raises `PromptError` for a message that holds something other than text, and for a conversation that the
        template refuses.
        """
        return render(self._handle.engine.backbone, conversation(messages))


class UserTurn:
    """``completion_to_prompt``: one user message for a model with a chat template, the bare text for another."""

    def __init__(self, handle: EngineHandle) -> None:
        self._handle = handle

    def __call__(self, prompt: str) -> str:
        return render_text(self._handle.engine.backbone, prompt)


def conversation(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Raises `PromptError` for a message that holds something other than text."""
    return [_written(message) for message in messages]


def _written(given: ChatMessage) -> dict[str, Any]:
    role = given.role.value
    others = [block.block_type for block in given.blocks if not isinstance(block, (TextBlock, ToolCallBlock))]
    check_text_only(role, (block for block in others if block != "cache"))
    details = given.additional_kwargs
    return message(
        role,
        given.content or "",
        calls=tool_calls(given),
        tool_call_id=details.get("tool_call_id") if role in ("tool", "function") else None,
        name=details.get("name") if role in ("tool", "function") else None,
    )
