"""LangChain's own unit tests of chat models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_cacheclip import ChatCacheClip
from langchain_tests.unit_tests import ChatModelUnitTests


class TestChatCacheClip(ChatModelUnitTests):
    folder: Path

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _folder(cls, tiny_folder: Path) -> None:
        cls.folder = tiny_folder

    @property
    def chat_model_class(self) -> type[ChatCacheClip]:
        return ChatCacheClip

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": str(self.folder)}
