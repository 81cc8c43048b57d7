"""One engine per process for all who ask for the same, and objects that can be copied and sent elsewhere."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from langchain_cacheclip import CacheClipCompressor, CacheClipVectorStore, ChatCacheClip
from langchain_core.load import dumpd
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableParallel
from langchain_core.vectorstores import InMemoryVectorStore

from cacheclip_rag import ConfigurationError, Engine, calling
from cacheclip_rag.frameworks import engines


@pytest.fixture
def by_name(tiny_folder: Path) -> Iterator[ChatCacheClip]:
    llm = ChatCacheClip(str(tiny_folder), max_tokens=4)
    yield llm
    llm.close()


def test_making_a_model_loads_nothing() -> None:
    llm = ChatCacheClip(model="there-is-no-such-model", kv_dir=Path("kv"), stop="\n")
    assert llm.kv_dir == "kv" and llm.stop == ["\n"] and llm.handle.peek() is None
    assert CacheClipCompressor(llm).handle.peek() is None


@pytest.mark.behaviour("LangChain", "objects with equal fields share one engine")
def test_equal_fields_share_an_engine(by_name: ChatCacheClip, tiny_folder: Path, tmp_path: Path) -> None:
    def other(**fields: Any) -> ChatCacheClip:
        return ChatCacheClip(str(tiny_folder), **fields)

    assert by_name.engine is other().engine
    assert by_name.engine is other(method="full", recompute_ratio=0.5, max_tokens=3, temperature=1).engine
    assert by_name.engine is other(method="query_guided:window=3").engine
    apart = other(kv_dir=tmp_path)
    try:
        assert apart.engine is not by_name.engine
        assert apart.engine is other(kv_dir=str(tmp_path / "x" / "..")).engine
    finally:
        apart.close()


def test_another_model_for_one_call(by_name: ChatCacheClip, tiny_folder: Path) -> None:
    other = ChatCacheClip(f"{tiny_folder}/.", max_tokens=4)
    try:
        answer = by_name.invoke("Hello.", model=other.model)
        assert answer.response_metadata["model_name"] == other.model and answer.text == by_name.invoke("Hello.").text
        assert other.handle.peek() is not None is not by_name.handle.peek()
    finally:
        other.close()


def test_threads_open_an_engine_once(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[engines.EngineSettings] = []
    open_ = engines.EngineSettings.open
    monkeypatch.setattr(engines.EngineSettings, "open", lambda self: opened.append(self) or open_(self))
    llms = [ChatCacheClip(str(tiny_folder), tenant="threads") for _ in range(8)]
    try:
        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(lambda llm: id(llm.engine), llms))) == 1
        assert len(opened) == 1
    finally:
        llms[0].close()
    assert llms[0].handle.peek() is None
    assert llms[0].engine is llms[1].engine and len(opened) == 2  # the next use opens it again
    llms[0].close()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_duplicates_work(llm: ChatCacheClip, by_name: ChatCacheClip, duplicate: Any) -> None:
    for original in (llm, by_name):
        expected = original.invoke("Hello.").text
        twin = duplicate(original)
        assert twin is not original and twin.engine is original.engine and twin.model_dump() == original.model_dump()
        assert twin.invoke("Hello.").text == expected
        compressor = duplicate(CacheClipCompressor(original, on_miss="encode"))
        assert compressor.on_miss == "encode" and compressor.handle.engine is original.engine


def test_a_copied_store_still_forwards(engine: Engine, embedding: Any) -> None:
    twin = copy.copy(CacheClipVectorStore(InMemoryVectorStore(embedding), engine))
    assert twin.add_texts(["short"], ids=["a"]) == ["a"] and twin.get_by_ids(["a"])


def test_serialised_it_is_only_named(by_name: ChatCacheClip) -> None:
    written = json.dumps(dumpd(by_name))
    assert json.loads(written)["type"] == "not_implemented"


WORKER = """
import json, pickle, sys
llm, compressor = pickle.load(open(sys.argv[1], "rb"))
from cacheclip_rag.frameworks import engines
lazy = not engines._engines and "torch" not in sys.modules
answer = llm.invoke("Hello.").text
print(json.dumps([lazy, answer, compressor.handle.engine is llm.engine]))
"""


def run_worker(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WORKER, str(path)], capture_output=True, text=True, timeout=240)


@pytest.mark.behaviour("LangChain", "worker processes")
def test_another_process_opens_its_own_when_it_needs_one(by_name: ChatCacheClip, tmp_path: Path) -> None:
    (tmp_path / "objects").write_bytes(pickle.dumps((by_name, CacheClipCompressor(by_name))))
    done = run_worker(tmp_path / "objects")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [True, by_name.invoke("Hello.").text, True]


def test_a_given_engine_cannot_follow_into_another_process(engine: Engine, tmp_path: Path) -> None:
    llm = ChatCacheClip.from_engine(engine)
    (tmp_path / "objects").write_bytes(pickle.dumps((llm, CacheClipCompressor(llm))))
    done = run_worker(tmp_path / "objects")
    assert done.returncode and ConfigurationError.__name__ in done.stderr and "kv_dir" in done.stderr


def test_a_forked_process_does_not_use_its_parents_engines(by_name: ChatCacheClip) -> None:
    assert by_name.engine is by_name.handle.peek()
    before = dict(engines._engines)
    try:
        engines._forget_all()  # what a fork does in the child
        assert by_name.handle.peek() is None
    finally:
        engines._engines.update(before)


@pytest.mark.behaviour("LangChain", "what one user's retrieval announces counts for that user only")
@pytest.mark.parametrize("how", ["invoke", "stream", "ainvoke", "astream", "batch"])
async def test_an_announced_question_belongs_to_its_caller(
    how: str, engine: Engine, embedding: Any, documents_of: Any, noting: Any, recorder: Any
) -> None:
    store = CacheClipVectorStore(InMemoryVectorStore(embedding), engine)
    store.add_documents(documents_of())
    llm, questions = ChatCacheClip.from_engine(engine, max_tokens=2), noting(engine)
    prompt = ChatPromptTemplate.from_messages([("system", "Use the context.\n\n{context}"), ("human", "{input}")])
    retrieved = itemgetter("search") | store.as_retriever() | (lambda found: "\n\n".join(d.page_content for d in found))
    chain = RunnableParallel(context=retrieved, input=itemgetter("input")) | prompt | llm
    given = {"search": "what did it carry?", "input": "Who drove the last train, and what did it carry?"}
    calls = recorder(engine)
    with calling("one"):
        if how == "invoke":
            chain.invoke(given)
        elif how == "stream":
            list(chain.stream(given))
        elif how == "ainvoke":
            await chain.ainvoke(given)
        elif how == "astream":
            [chunk async for chunk in chain.astream(given)]
        else:
            chain.batch([given])
    assert questions == [given["search"]]
    for caller, expected in (("two", given["input"]), (None, given["input"]), ("one", given["search"])):
        with calling(caller):
            engine.generate(calls.prompts[0], max_new_tokens=1)
        assert questions[-1] == expected, caller
