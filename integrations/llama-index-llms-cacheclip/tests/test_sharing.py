"""One engine per process for all who ask for the same, and objects that can be copied and sent elsewhere."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.llms.cacheclip import CacheClipLLM, CacheClipTransform, CacheClipVectorStore
from llama_index.postprocessor.cacheclip import CacheClipPostprocessor

from cacheclip_rag import ConfigurationError, Engine, calling
from cacheclip_rag.frameworks import engines


@pytest.fixture
def by_name(tiny_folder: Path) -> Iterator[CacheClipLLM]:
    llm = CacheClipLLM(model_name=str(tiny_folder), max_new_tokens=4)
    yield llm
    llm.close()


def test_making_an_llm_loads_nothing() -> None:
    llm = CacheClipLLM(model_name="there-is-no-such-model", kv_dir=Path("kv"), stop="\n")
    assert llm.kv_dir == "kv" and llm.stop == ["\n"] and llm.handle.peek() is None


@pytest.mark.behaviour("LlamaIndex", "objects with equal fields share one engine")
def test_equal_fields_share_an_engine(by_name: CacheClipLLM, tiny_folder: Path, tmp_path: Path) -> None:
    def other(**fields: Any) -> CacheClipLLM:
        return CacheClipLLM(model_name=str(tiny_folder), **fields)

    assert by_name.engine is other().engine
    assert by_name.engine is other(method="full", recompute_ratio=0.5, max_new_tokens=3, temperature=1).engine
    apart = other(kv_dir=tmp_path)
    try:
        assert apart.engine is not by_name.engine
        assert apart.engine is other(kv_dir=str(tmp_path / "x" / "..")).engine
    finally:
        apart.close()


def test_methods_compared_on_one_engine(by_name: CacheClipLLM, tiny_folder: Path) -> None:
    passage = "Passage one says a good deal about the harbour and the trains that went there. " * 2
    CacheClipTransform(by_name)([TextNode(text=passage)])
    prompt = f"{passage}\nWhat does it say?"
    full = CacheClipLLM(model_name=str(tiny_folder), max_new_tokens=4, method="full")
    assert full.complete(prompt).raw["cacheclip"]["method"] == "full"
    assert by_name.complete(prompt).raw["cacheclip"]["method"] == "auto"
    assert by_name.last_report().reused and not full.last_report().reused  # type: ignore[union-attr]


def test_threads_open_an_engine_once(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[engines.EngineSettings] = []
    open_ = engines.EngineSettings.open
    monkeypatch.setattr(engines.EngineSettings, "open", lambda self: opened.append(self) or open_(self))
    llms = [CacheClipLLM(model_name=str(tiny_folder), tenant="threads") for _ in range(8)]
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
def test_duplicates_work(llm: CacheClipLLM, by_name: CacheClipLLM, duplicate: Any) -> None:
    for original in (llm, by_name):
        original.callback_manager = CallbackManager([TokenCountingHandler(tokenizer=lambda text: [])])
        expected = original.complete("Hello.").text
        twin = duplicate(original)
        assert twin is not original and twin.engine is original.engine and twin.model_dump() == original.model_dump()
        assert twin.complete("Hello.").text == expected
        postprocessor = duplicate(CacheClipPostprocessor(original, on_miss="encode"))
        assert postprocessor.on_miss == "encode" and postprocessor.handle.engine is original.engine
        transform = duplicate(CacheClipTransform(original, show_progress=False))
        assert not transform.show_progress and transform.handle.engine is original.engine
        transform([TextNode(text=f"{duplicate!r} " * 9)])
        assert original.engine.knows(f"{duplicate!r} " * 9)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_duplicates_of_what_holds_them(llm: CacheClipLLM, duplicate: Any) -> None:
    texts = [f"{duplicate!r} {number} " * 9 for number in range(2)]
    store = CacheClipVectorStore(SimpleVectorStore(), llm, show_progress=False)
    context = StorageContext.from_defaults(vector_store=store)
    VectorStoreIndex([TextNode(text=texts[0], id_="0")], storage_context=context, embed_model=MockEmbedding(4))
    twin = duplicate(context.vector_store)
    assert isinstance(twin, CacheClipVectorStore) and twin.store is not store.store
    twin.add([TextNode(text=texts[1], id_="1", embedding=[1.0, 0.0, 0.0, 0.0])])
    twin.delete_nodes(["0"])
    twin.flush()
    assert [llm.engine.knows(text) for text in texts] == [False, True]
    if duplicate is copy.deepcopy:
        assert duplicate(context).vector_store is not store
    count = duplicate(llm.tokenizer_fn)
    assert count("two words") == llm.tokenizer_fn("two words")
    assert SentenceSplitter(tokenizer=count).split_text("two words") == ["two words"]
    memory = ChatMemoryBuffer.from_defaults(token_limit=100, tokenizer_fn=llm.tokenizer_fn)
    assert duplicate(memory).get("two words") == [] and memory.model_copy(deep=True).get() == []


def test_fields_are_plain_data(by_name: CacheClipLLM) -> None:
    fields = json.loads(json.dumps(by_name.to_dict()))
    assert fields.pop("class_name") == "CacheClipLLM"
    assert CacheClipLLM.from_dict(by_name.to_dict()).engine is by_name.engine


WORKER = """
import json, pickle, sys
llm, postprocessor, transform, nodes = pickle.load(open(sys.argv[1], "rb"))
from cacheclip_rag.frameworks import engines
returned = transform(nodes)
deferred = returned is nodes and not engines._engines and "torch" not in sys.modules
answer = llm.complete("Hello.").text
print(json.dumps([deferred, answer, postprocessor.handle.engine is llm.engine]))
"""


def run_worker(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WORKER, str(path)], capture_output=True, text=True, timeout=240)


@pytest.mark.behaviour("LlamaIndex", "worker processes")
def test_another_process_opens_its_own_when_it_needs_one(by_name: CacheClipLLM, tmp_path: Path) -> None:
    objects = (by_name, CacheClipPostprocessor(by_name), CacheClipTransform(by_name), [TextNode(text="word " * 50)])
    (tmp_path / "objects").write_bytes(pickle.dumps(objects))
    done = run_worker(tmp_path / "objects")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [True, by_name.complete("Hello.").text, True]


def test_a_given_engine_cannot_follow_into_another_process(engine: Engine, tmp_path: Path) -> None:
    llm = CacheClipLLM.from_engine(engine)
    objects = (llm, CacheClipPostprocessor(llm), CacheClipTransform(llm), [TextNode(text="word " * 50)])
    (tmp_path / "objects").write_bytes(pickle.dumps(objects))
    done = run_worker(tmp_path / "objects")
    assert done.returncode and ConfigurationError.__name__ in done.stderr and "model_name" in done.stderr


def test_a_forked_process_does_not_use_its_parents_engines(by_name: CacheClipLLM) -> None:
    assert by_name.engine is by_name.handle.peek()
    before = dict(engines._engines)
    try:
        engines._forget_all()  # what a fork does in the child
        assert by_name.handle.peek() is None
    finally:
        engines._engines.update(before)


@pytest.mark.behaviour("LlamaIndex", "what one user's retrieval announces counts for that user only")
@pytest.mark.parametrize("how", ["query", "aquery", "stream", "chat", "achat"])
async def test_an_announced_question_belongs_to_its_caller(
    how: str, informed: Engine, passages_index: VectorStoreIndex, noting: Any, recorder: Any
) -> None:
    llm, questions = CacheClipLLM.from_engine(informed, max_new_tokens=2), noting(informed)
    options: Any = {"llm": llm, "similarity_top_k": 2, "node_postprocessors": [CacheClipPostprocessor(llm)]}
    own, calls = "Who drove the last train?", recorder(informed)
    with calling("one"):
        if how in ("chat", "achat"):
            engine = passages_index.as_chat_engine(chat_mode="context", **options)
            str(engine.chat(own) if how == "chat" else await engine.achat(own))
        else:
            engine = passages_index.as_query_engine(streaming=how == "stream", **options)
            str(await engine.aquery(own) if how == "aquery" else engine.query(own))
    assert questions == [own]
    prompt = calls.prompts[0].replace(own, f"{own} Say it twice.")
    for caller, counts in (("two", False), (None, False), ("one", True)):
        with calling(caller):
            informed.generate(prompt, max_new_tokens=1)
        assert (questions[-1] == own) == counts, caller
