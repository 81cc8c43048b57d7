"""The example runs, and is two lines away from an application that knows nothing of us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Settings
from llama_index.llms.cacheclip import CacheClipLLM
from two_lines import changed_lines, load


@pytest.mark.behaviour("LlamaIndex", "two lines of an application, changed (examples/)")
def test_the_chat_engine(
    tiny_folder: Path,
    tmp_path: Path,
    nodes_of: Any,
    embedding: Any,
    recorder: Any,
    writing: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Settings, "_embed_model", embedding)
    (tmp_path / "docs").mkdir()
    for node in nodes_of():
        (tmp_path / "docs" / f"{node.node_id}.txt").write_text(node.text)
    llm = CacheClipLLM(str(tiny_folder), kv_dir=".cacheclip")  # shares the application's engine
    try:
        calls = recorder(llm.engine)
        chat = load("llamaindex_chat_engine").chat_engine(str(tiny_folder), "docs")
        writing(llm.engine, "Ada Lindqvist did.")
        assert "Lindqvist" in "".join(chat.stream_chat("Who built the lighthouse?").response_gen)
        assert len(calls.keys()) == 4 and not calls.streams[0].report.fallbacks
    finally:
        llm.close()
    assert changed_lines("llamaindex_chat_engine") == 2
