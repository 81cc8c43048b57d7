"""The examples run, and are two lines away from applications that know nothing of us."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_cacheclip import ChatCacheClip
from two_lines import changed_lines, load


@pytest.fixture
def llm(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatCacheClip]:
    """It shares the applications' engine."""
    monkeypatch.chdir(tmp_path)
    llm = ChatCacheClip(str(tiny_folder), kv_dir=".cacheclip")
    yield llm
    llm.close()


@pytest.mark.behaviour("LangChain", "two lines of an application, changed (examples/)")
def test_the_agent(llm: ChatCacheClip, documents_of: Any, embedding: Any, recorder: Any, writing: Any) -> None:
    agent = load("langchain_agent").agent(llm.model, documents_of(), embedding)
    call = {"name": "search", "arguments": {"query": "harbour railway"}}
    writing(llm.engine, f"<tool_call>\n{json.dumps(call)}\n</tool_call>", "Okafor.")
    calls = recorder(llm.engine)
    result = agent.invoke({"messages": [("user", "Who drove the last train?")]})
    assert result["messages"][-1].text == "Okafor." and len(calls.keys()) == 3
    assert changed_lines("langchain_agent") == 2


@pytest.mark.behaviour("LangChain", "two lines of an application, changed (examples/)")
async def test_the_back_end(llm: ChatCacheClip, documents_of: Any, embedding: Any, recorder: Any, writing: Any) -> None:
    pytest.importorskip("fastapi")
    import httpx

    app = load("fastapi_backend").backend(llm.model, embedding)
    calls = recorder(llm.engine)
    writing(llm.engine, *["Ada Lindqvist did."] * 4)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://app") as client:
        for document in documents_of():
            (await client.put(f"/documents/{document.id}", params={"text": document.page_content})).raise_for_status()
        question = {"question": "Who built the lighthouse?"}
        async with client.stream("GET", "/answer", params=question) as response:
            pieces = [piece async for piece in response.aiter_text()]
        assert "".join(pieces) == "Ada Lindqvist did." and len(calls.keys()) == 4
        await client.delete("/documents/p0")
        assert not llm.engine.knows(documents_of()[0].page_content)
        assert (await client.get("/answer", params=question)).text == "Ada Lindqvist did."
    assert changed_lines("fastapi_backend") == 2
