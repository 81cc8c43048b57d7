"""`ChatCacheClip(base_url=...)` against the embedded engine's own server: the two lines of today, over HTTP."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from http_server import serving
from langchain.agents import create_agent
from langchain_cacheclip import CacheClipCompressor, CacheClipVectorStore, ChatCacheClip, cacheclip_warm
from langchain_cacheclip.server import ChatCacheClipServer
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.globals import set_llm_cache
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField
from langchain_core.tools import tool
from langchain_core.vectorstores import InMemoryVectorStore
from pydantic import BaseModel
from recording import script
from threads import until
from tiny import PASSAGES, QUESTION, two_layers

from cacheclip_rag import ConfigurationError, Engine
from cacheclip_rag.errors import ServerError
from cacheclip_rag.server.app import app
from cacheclip_rag.server.client import ChunkClient
from cacheclip_rag.server.embedded import Engines

BACKBONE = two_layers()
PROMPT = "\n\n".join([*PASSAGES[:3], QUESTION])
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Visby"}}\n</tool_call>'


class Served:
    """A server of two tenants; ``engine`` is the first's."""

    def __init__(self) -> None:
        self.engines = Engines(lambda tenant: Engine(BACKBONE, tenant=tenant))
        self.url = ""

    @property
    def engine(self) -> Engine:
        return self.engines.of("acme")

    def llm(self, **fields: Any) -> Any:
        return ChatCacheClip(**{"base_url": self.url, "api_key": "red", "max_tokens": 6, "max_retries": 0, **fields})

    def knows(self, *texts: str) -> list[bool]:
        return [self.engine.knows(text) for text in texts]


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    with serving(app(made.engines, "tiny", {"red": "acme", "blue": "zenith"})) as made.url:
        yield made
    BACKBONE.__dict__.pop("generate", None)


@pytest.fixture
def informed(served: Served) -> Served:
    with ChunkClient(served.url, "red") as client:
        assert client.add(PASSAGES).encoded == 5
    return served


def reused(llm: Any) -> int:
    report = llm.last_report()
    assert report is not None and report.prompt_tokens and report.completion_tokens, report
    return int(report.reused)


# ---- answers --------------------------------------------------------------------------------------------------------


def test_base_url_makes_a_client_that_is_used_like_any(informed: Served) -> None:
    llm = informed.llm()
    assert isinstance(llm, ChatCacheClipServer)
    wanted = informed.engine.generate(BACKBONE.chat([{"role": "user", "content": PROMPT}]), max_new_tokens=6)
    message = llm.invoke(PROMPT)
    assert message.content == wanted.text
    report = llm.last_report()
    assert (report.reused, report.recomputed) == (wanted.report.reused, wanted.report.recomputed)
    assert report.reused > 100 and len(report.chunks) == 3 and "from cache" in str(report)
    assert message.response_metadata["cacheclip"] == report.as_dict()
    assert message.usage_metadata["output_tokens"] == 6
    assert message.usage_metadata["input_token_details"]["cache_read"] == report.cached_tokens


@pytest.mark.parametrize("way", ["invoke", "batch", "stream", "ainvoke", "astream"])
def test_every_call_reuses_and_reports(informed: Served, way: str) -> None:
    wanted = informed.llm().invoke(PROMPT).content
    llm = informed.llm()

    async def ask() -> list[Any]:
        if way == "ainvoke":
            return [await llm.ainvoke(PROMPT)]
        return [piece async for piece in llm.astream(PROMPT)]

    if way.startswith("a"):
        pieces = asyncio.run(ask())
        assert len(asyncio.run(ask())) == len(pieces)  # and on another event loop
    elif way == "batch":
        pieces = [llm.batch([PROMPT, PROMPT])[1]]
    else:
        pieces = list(llm.stream(PROMPT)) if way == "stream" else [llm.invoke(PROMPT)]
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert whole.content == wanted and (len(pieces) > 3 or "stream" not in way)
    assert reused(llm) > 100 and whole.response_metadata["cacheclip"]["reused"] == reused(llm)
    assert whole.usage_metadata["output_tokens"] == 6
    assert whole.usage_metadata["input_token_details"]["cache_read"] > 100


def test_options_of_the_model_and_of_a_call(informed: Served) -> None:
    def asked(llm: Any, **options: Any) -> dict[str, Any]:
        return dict(llm.invoke(PROMPT, **options).response_metadata["cacheclip"])

    llm = informed.llm(method="naive", recompute_ratio=0.5)
    assert (asked(llm)["method"], asked(llm)["requested_ratio"]) == ("naive", 0.5)
    other = asked(llm, method="query_guided")
    assert other["method"] == "query_guided" and other["requested_ratio"] != 0.5  # which belonged to the other method
    assert asked(llm.bind(method="full"))["reused"] == 0
    assert asked(llm, max_tokens=2)["completion_tokens"] == asked(llm, max_new_tokens=2)["completion_tokens"] == 2
    assert asked(llm, extra_body={"cacheclip": {"reuse": False}})["method"] == "full"
    sampled = {"temperature": 2.0, "top_p": 0.95, "top_k": 50, "max_tokens": 24}
    one, same, third = (informed.llm(seed=seed, **sampled).invoke(PROMPT).content for seed in (1, 1, 2))
    assert one == same != third
    script(informed.engine, "One. Two. Three.")
    assert informed.llm(max_tokens=64).invoke(PROMPT, stop=[" Two"]).content == "One."


def test_configurable_fields(informed: Served) -> None:
    llm = informed.llm().configurable_fields(method=ConfigurableField(id="method"))
    answer = llm.with_config(configurable={"method": "naive"}).invoke(PROMPT)
    assert answer.response_metadata["cacheclip"]["method"] == "naive"


def test_answers_cached_by_langchain_do_not_cross_settings(informed: Served) -> None:
    set_llm_cache(InMemoryCache())
    try:
        for llm in (informed.llm(), informed.llm(method="naive"), informed.llm(max_tokens=3)):
            llm.invoke(PROMPT)
            assert llm.last_report() is not None
        again = informed.llm()
        again.invoke(PROMPT)
        assert again.last_report() is None
    finally:
        set_llm_cache(None)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_leaving_a_stream_ends_its_request(informed: Served, asynchronous: bool) -> None:
    token = BACKBONE.tokenise("a", plain=True).ids.tolist()

    def endless(*_: Any, **__: Any) -> Iterator[int]:
        while True:
            yield from token

    informed.engine.backbone.generate = endless  # type: ignore[method-assign]
    llm = informed.llm(max_tokens=100_000)

    async def leave() -> None:
        stream = llm.astream(QUESTION)
        await anext(stream)
        await stream.aclose()

    if asynchronous:
        asyncio.run(leave())
    else:
        stream = llm.stream(QUESTION)
        next(stream)
        stream.close()
    until(lambda: informed.engine.stats().finished.get("auto") == {"cancelled": 1})
    assert informed.engine.stats().in_flight == 0


# ---- ingestion ------------------------------------------------------------------------------------------------------


def documents() -> list[Document]:
    return [Document(id=f"d{number}", page_content=text) for number, text in enumerate(PASSAGES)]


def store_of(served: Served, **options: Any) -> CacheClipVectorStore:
    inner = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    return CacheClipVectorStore(inner, served.llm(), show_progress=False, **options)


def test_ingest_ask_and_delete(served: Served) -> None:
    llm, store = served.llm(), store_of(served)
    store.add_documents(documents())
    assert served.knows(*PASSAGES) == [True] * 5 and served.engine.documents.of("d0")
    prompt = ChatPromptTemplate.from_messages([("system", "Answer from:\n\n{context}"), ("user", "{input}")])
    retriever = store.as_retriever(search_kwargs={"k": 5})
    chain = create_retrieval_chain(retriever, cacheclip_warm(llm) | create_stuff_documents_chain(llm, prompt))
    assert chain.invoke({"input": QUESTION})["answer"]
    assert reused(llm) > 100 and len(llm.last_report().chunks) == 5
    assert "".join(piece.get("answer", "") for piece in chain.stream({"input": QUESTION}))
    assert asyncio.run(chain.ainvoke({"input": QUESTION}))["answer"]
    store.delete(["d1"])
    assert served.knows(*PASSAGES[:3]) == [True, False, True]
    chain.invoke({"input": QUESTION})
    assert len(llm.last_report().chunks) == 4
    store.add_documents([Document(id="d0", page_content=PASSAGES[1])])  # written over
    assert served.knows(*PASSAGES[:2]) == [False, True]


def test_what_another_store_has_stays(served: Served) -> None:
    mine, other = store_of(served), store_of(served)
    mine.add_texts([PASSAGES[0]], ids=["a"])
    other.add_texts([PASSAGES[0]], ids=["b"])
    mine.delete(["a"])
    assert served.knows(PASSAGES[0]) == [True]
    asyncio.run(other.adelete(["b"]))
    assert served.knows(PASSAGES[0]) == [False]


def test_ensure_all_and_what_is_retrieved(served: Served) -> None:
    store = store_of(served)
    store.store.add_documents(documents())
    found = store.similarity_search(QUESTION, k=5)
    assert served.knows(*PASSAGES) == [False] * 5
    assert CacheClipCompressor(served.llm()).compress_documents(found[:1], QUESTION) == found[:1]
    assert served.knows(found[0].page_content) == [False]
    CacheClipCompressor(served.llm(), on_miss="encode").compress_documents(found[:1], QUESTION)
    assert served.knows(found[0].page_content) == [True]
    assert store.ensure_all() == 4 and store.ensure_all() == 0 and served.knows(*PASSAGES) == [True] * 5
    assert served.engine.documents.of("d3")


def test_many_documents_at_once(served: Served) -> None:
    many = {
        f"e{number}": f"Entry {number}: the clerk of room {number * 7} noted that a parcel had come, and three letters."
        for number in range(60)
    }
    store_of(served).add_texts(list(many.values()), ids=list(many))
    assert all(served.knows(*many.values())) and all(map(served.engine.documents.of, many))


def test_fusing_is_refused(served: Served) -> None:
    with pytest.raises(ConfigurationError, match="leave it out"):
        store_of(served, fuse=10)


# ---- tools and structured output ------------------------------------------------------------------------------------


class Person(BaseModel):
    age: int


@tool
def weather(place: str) -> str:
    """The weather at a place."""
    return f"Rain in {place}."


def test_tools(informed: Served) -> None:
    llm = informed.llm(max_tokens=300)
    script(informed.engine, CALL, CALL)
    [call] = llm.bind_tools([weather]).invoke(PROMPT).tool_calls
    assert (call["name"], call["args"]) == ("weather", {"place": "Visby"}) and reused(llm) > 100
    whole = None
    for piece in llm.bind_tools([weather]).stream(PROMPT):
        whole = piece if whole is None else whole + piece
    assert whole.tool_calls[0]["args"] == {"place": "Visby"} and reused(llm) > 100
    BACKBONE.__dict__.pop("generate")
    [forced] = llm.bind_tools([weather], tool_choice="any").invoke(PROMPT).tool_calls
    assert forced["name"] == "weather" and forced["args"].keys() == {"place"}


def test_an_agent(informed: Served) -> None:
    llm = informed.llm(max_tokens=300)
    script(informed.engine, CALL, "It rains.")
    messages = create_agent(llm, [weather]).invoke({"messages": [("user", PROMPT)]})["messages"]
    assert messages[-1].content == "It rains." and messages[-2].content == "Rain in Visby." and reused(llm) > 100


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(informed: Served, method: str) -> None:
    llm = informed.llm(max_tokens=300)
    asked = llm.with_structured_output(Person, method=method)
    assert isinstance(asked.invoke(PROMPT).age, int) and reused(llm) > 100
    *_, last = asked.stream(PROMPT)
    assert isinstance(last.age, int) and reused(llm) > 100


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"device": "cpu"}, "--device"),
        ({"kv_dir": "kv"}, "--store"),
        ({"store": "kv"}, "--store"),
        ({"auxiliary": "x"}, "--auxiliary"),
        ({"tenant": "acme"}, "--api-key KEY=TENANT"),
        ({"max_requests": 3}, "leave it out"),
        ({"methd": "naive"}, 'did you mean "method"'),
        ({"recompute_ratio": 2}, "recompute_ratio"),
        ({"base_url": "localhost:8000"}, "http://localhost:8000/v1"),
    ],
)
def test_a_field_that_means_nothing_here_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ChatCacheClip(**{"base_url": "http://localhost:1", **fields})
    assert said in str(caught.value)


def test_nothing_is_asked_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of somebody else")
    llm = ChatCacheClip(base_url="http://localhost:1", kv_dir=None)
    assert llm.openai_api_base == "http://localhost:1/v1" and llm.root_client.api_key == "none"
    with pytest.raises(ConfigurationError, match="another process"):
        llm.engine  # noqa: B018
    with pytest.raises(ConfigurationError, match="custom_get_token_ids"):
        llm.get_num_tokens("One")


CALLS: list[Callable[[Any], Any]] = [
    lambda llm: llm.invoke(PROMPT),
    lambda llm: list(llm.stream(PROMPT)),
    lambda llm: asyncio.run(llm.ainvoke(PROMPT)),
]


@pytest.mark.parametrize("call", CALLS)
def test_errors_are_the_librarys_with_the_servers_sentence(informed: Served, call: Callable[[Any], Any]) -> None:
    for fields, status, said in (
        ({"api_key": "green"}, 401, "this server needs an API key"),
        ({"api_key": "green", "model": "tiny"}, 401, "this server needs an API key"),
        ({"model": "gpt"}, 404, 'no model is called "gpt" here: it is "tiny"'),
        ({"method": "nave"}, 400, "nave"),
        ({"presence_penalty": 1}, 400, "presence_penalty"),
    ):
        with pytest.raises(ServerError, match=said) as caught:
            call(informed.llm(**fields))
        assert caught.value.status == status
    with pytest.raises(ServerError, match=r"^http://127\.0\.0\.1:9/v1 did not answer: .*(refused|failed)") as down:
        call(informed.llm(base_url="http://127.0.0.1:9", model="tiny"))
    assert down.value.status is None
    llm = informed.llm()
    call(llm)
    assert reused(llm) > 100


def test_an_error_in_the_middle_of_a_stream(informed: Served) -> None:
    def broken(*_: Any, **__: Any) -> Iterator[int]:
        yield from BACKBONE.tokenise("One", plain=True).ids.tolist()
        raise RuntimeError("secret detail")

    informed.engine.backbone.generate = broken  # type: ignore[method-assign]
    with pytest.raises(ServerError, match="internal error"):
        list(informed.llm().stream(PROMPT))


def test_ingestion_without_a_server_loses_no_vectors(caplog: pytest.LogCaptureFixture) -> None:
    inner = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    store = CacheClipVectorStore(inner, ChatCacheClip(base_url="http://127.0.0.1:9"))
    assert store.add_documents(documents()[:1]) == ["d0"] and "chunks not encoded" in caplog.text
    with pytest.raises(ServerError, match="did not answer"):
        store.ensure_all()
    store.delete(["d0"])
    assert inner.store == {} and "was not dropped" in caplog.text


def test_a_stream_without_a_report_says_so(informed: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's server, which sends none with a stream."""
    from cacheclip_rag.server.wire import Wire

    monkeypatch.setattr(Wire, "_reported", lambda self, report: {})
    llm = informed.llm()
    assert list(llm.stream(PROMPT))
    assert "without a report" in str(llm.last_report()) and llm.last_report().reused == 0
    assert llm.last_report().prompt_tokens > 100 and llm.last_report().completion_tokens == 6


# ---- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_ask_the_same_server(informed: Served, copied: Callable[[Any], Any]) -> None:
    llm = informed.llm(method="naive")
    llm.invoke(PROMPT)
    asyncio.run(llm.ainvoke(PROMPT))
    other = copied(llm)
    assert other.invoke(PROMPT).content == llm.invoke(PROMPT).content and other.method == "naive"
    assert reused(other) > 100
    assert asyncio.run(other.ainvoke(PROMPT)).response_metadata["cacheclip"]["reused"] > 100
    copied(CacheClipCompressor(llm, on_miss="encode")).compress_documents(documents(), QUESTION)
    store = copied(store_of(informed))
    fresh = "Somebody wrote this sentence for a copy of a store, and made it long enough to be a chunk of its own."
    store.add_texts([fresh], ids=["fresh"])
    assert informed.knows(fresh) == [True]


def test_the_key_is_not_shown(served: Served) -> None:
    assert "blue" not in repr(served.llm(api_key="blue")) and "blue" not in str(served.llm(api_key="blue").dict())


def test_a_key_stands_for_a_tenant(informed: Served) -> None:
    other = informed.llm(api_key="blue")
    other.invoke(PROMPT)
    assert reused(other) == 0
