"""`CacheClipLLM(base_url=...)` against the embedded engine's own server: the two lines of today, over HTTP."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from http_server import serving
from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.agent import FunctionAgent
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.llms import ChatMessage
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import Document, NodeRelationship, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.tools import FunctionTool
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.llms.cacheclip import CacheClipLLM, CacheClipTransform, CacheClipVectorStore
from llama_index.llms.cacheclip.server import CacheClipServerLLM
from llama_index.postprocessor.cacheclip import CacheClipPostprocessor
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
        return CacheClipLLM(**{"base_url": self.url, "api_key": "red", "max_new_tokens": 6, "max_retries": 0, **fields})

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
    assert isinstance(llm, CacheClipServerLLM)
    assert llm.model_name == llm.metadata.model_name == "tiny"
    assert llm.metadata.context_window == BACKBONE.context_length and llm.metadata.num_output == 6
    wanted = informed.engine.generate(BACKBONE.chat([{"role": "user", "content": PROMPT}]), max_new_tokens=6)
    whole = llm.complete(PROMPT)
    assert whole.text == wanted.text
    report = llm.last_report()
    assert (report.reused, report.recomputed, report.fresh) == (
        wanted.report.reused,
        wanted.report.recomputed,
        wanted.report.fresh,
    )
    assert report.reused > 100 and len(report.chunks) == 3 and report.ttft > 0 and "from cache" in str(report)
    assert whole.raw["cacheclip"] == report.as_dict() and whole.raw["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("way", ["chat", "complete", "stream_chat", "stream_complete"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_call_reuses_and_reports(informed: Served, way: str, asynchronous: bool) -> None:
    wanted = informed.llm().complete(PROMPT).text
    llm = informed.llm()
    given: Any = PROMPT if "complete" in way else [ChatMessage(PROMPT)]

    async def ask() -> list[Any]:
        answer = await getattr(llm, f"a{way}")(given)
        return [piece async for piece in answer] if "stream" in way else [answer]

    if asynchronous:
        pieces = asyncio.run(ask())
        assert len(asyncio.run(ask())) == len(pieces)  # and on another event loop
    else:
        answer = getattr(llm, way)(given)
        pieces = list(answer) if "stream" in way else [answer]
    last = pieces[-1]
    assert (last.text if "complete" in way else last.message.content) == wanted
    if "stream" in way:
        assert len(pieces) > 3 and "".join(piece.delta for piece in pieces) == wanted
    assert reused(llm) > 100 and last.raw["cacheclip"]["reused"] == reused(llm)
    assert last.raw["usage"]["prompt_tokens_details"]["cached_tokens"] > 100


def test_a_text_model_is_completed_without_a_template(informed: Served) -> None:
    llm = informed.llm(is_chat_model=False)
    assert llm.complete(PROMPT).text == informed.engine.generate(PROMPT, max_new_tokens=6).text
    assert reused(llm) > 100
    assert "".join(piece.delta for piece in llm.stream_complete(PROMPT)) == llm.complete(PROMPT).text


def test_options_of_the_llm_and_of_a_call(informed: Served) -> None:
    llm = informed.llm(method="naive", recompute_ratio=0.5)
    assert llm.complete(PROMPT).raw["cacheclip"]["method"] == "naive"
    assert llm.last_report().requested_ratio == 0.5
    assert llm.complete(PROMPT, method="query_guided").raw["cacheclip"]["method"] == "query_guided"
    assert llm.last_report().requested_ratio != 0.5  # which belonged to the other method
    assert llm.complete(PROMPT, method="full").raw["cacheclip"]["reused"] == 0
    assert llm.complete(PROMPT, max_new_tokens=2).raw["usage"]["completion_tokens"] == 2
    own = {"extra_body": {"cacheclip": {"reuse": False}}}
    assert llm.complete(PROMPT, **own).raw["cacheclip"]["method"] == "full"
    sampled = {"temperature": 2.0, "top_p": 0.95, "top_k": 50, "max_new_tokens": 24}
    one, same, other = (informed.llm(seed=seed, **sampled).complete(PROMPT).text for seed in (1, 1, 2))
    assert one == same != other
    script(informed.engine, "One. Two. Three.")
    assert informed.llm(stop=" Two", max_new_tokens=64).complete(PROMPT).text == "One."


class Keeping(BaseEventHandler):
    """Keeps events, and with them the exception a stream was closed with."""

    events: list[Any] = []  # noqa: RUF012

    @classmethod
    def class_name(cls) -> str:
        return "Keeping"

    def handle(self, event: BaseEvent, **kwargs: Any) -> Any:
        self.events.append(event)


def test_closing_a_stream_ends_its_request(informed: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = Keeping()
    monkeypatch.setattr(get_dispatcher(), "event_handlers", [handler])
    token = BACKBONE.tokenise("a", plain=True).ids.tolist()

    def endless(*_: Any, **__: Any) -> Iterator[int]:
        while True:
            yield from token

    informed.engine.backbone.generate = endless  # type: ignore[method-assign]
    stream = informed.llm(max_new_tokens=100_000).stream_chat([ChatMessage(QUESTION)])
    next(stream)
    stream.close()
    assert handler.events
    until(lambda: informed.engine.stats().finished.get("auto") == {"cancelled": 1})
    assert informed.engine.stats().in_flight == 0


# ---- ingestion ------------------------------------------------------------------------------------------------------


def nodes() -> list[TextNode]:
    return [TextNode(id_=f"n{number}", text=text) for number, text in enumerate(PASSAGES)]


def test_ingest_and_ask(served: Served) -> None:
    llm = served.llm()
    documents = [Document(text=text, id_=f"d{number}") for number, text in enumerate(PASSAGES)]
    index = VectorStoreIndex.from_documents(
        documents,
        transformations=[SentenceSplitter(), CacheClipTransform(llm)],
        embed_model=MockEmbedding(8),
    )
    assert served.knows(*PASSAGES) == [True] * 5 and served.engine.documents.of("d0")
    engine = index.as_query_engine(llm, similarity_top_k=5, node_postprocessors=[CacheClipPostprocessor(llm)])
    answer = engine.query(QUESTION)
    assert len(answer.source_nodes) == 5 and reused(llm) > 100 and len(llm.last_report().chunks) == 5
    stream = index.as_query_engine(llm, similarity_top_k=2, streaming=True).query(QUESTION)
    assert "".join(stream.response_gen) and len(llm.last_report().chunks) == 2


def test_what_a_document_no_longer_has_is_forgotten(served: Served) -> None:
    transform = CacheClipTransform(served.llm())
    one, shared, new = PASSAGES[0], PASSAGES[1], PASSAGES[2]

    def ingest(document: str, *texts: str, by: CacheClipTransform = transform) -> None:
        made = [TextNode(text=text) for text in texts]
        for node in made:
            node.relationships = {NodeRelationship.SOURCE: Document(id_=document).as_related_node_info()}
        by(made)

    ingest("a", one, shared)
    ingest("b", shared)
    ingest("a", new)
    assert served.knows(one, shared, new) == [False, True, True]
    ingest("b", PASSAGES[3])
    assert served.knows(shared, new) == [False, True]
    # another transform, as with chunks of another size, has its own of the same document
    ingest("a", PASSAGES[4], by=CacheClipTransform(served.llm()))
    assert served.knows(new, PASSAGES[4]) == [True, True]


def store_of(served: Served, **fields: Any) -> CacheClipVectorStore:
    return CacheClipVectorStore(SimpleVectorStore(stores_text=False), served.llm(), show_progress=False, **fields)


def test_the_vector_store_adds_and_deletes(served: Served) -> None:
    store = store_of(served, grace=0)
    index = VectorStoreIndex.from_documents(
        [Document(text=text, id_=f"d{number}") for number, text in enumerate(PASSAGES[:3])],
        storage_context=StorageContext.from_defaults(vector_store=store),
        transformations=[SentenceSplitter()],
        embed_model=MockEmbedding(8),
    )
    assert served.knows(*PASSAGES) == [True] * 3 + [False] * 2
    llm = served.llm()
    llm.complete(PROMPT)
    assert len(llm.last_report().chunks) == 3
    index.delete_ref_doc("d1", delete_from_docstore=True)
    assert served.knows(*PASSAGES[:3]) == [True, False, True]
    llm.complete(PROMPT)
    assert len(llm.last_report().chunks) == 2


def test_a_document_that_is_updated_keeps_what_it_still_has(served: Served) -> None:
    first = f"{PASSAGES[0]}\n\n\n{PASSAGES[1]}"
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=64, chunk_overlap=0), MockEmbedding(8)],
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS,
        vector_store=store_of(served),
    )
    texts = [node.get_content() for node in pipeline.run(documents=[Document(text=first, id_="d")])]
    before = served.engine.stats().store.entries
    assert before == len(texts) > 1 and all(served.knows(*texts))
    # as another process would: nothing here knows what the document had
    pipeline.vector_store = store_of(served)
    new = [node.get_content() for node in pipeline.run(documents=[Document(text=PASSAGES[1], id_="d")])]
    assert all(served.knows(*new)) and served.engine.stats().store.entries == len(new)
    assert not any(served.knows(*(text for text in texts if text not in new)))


def test_what_another_document_has_stays(served: Served) -> None:
    mine, other = store_of(served, grace=0), store_of(served, grace=0)

    def node(id_: str, document: str | None) -> TextNode:
        made = TextNode(id_=id_, text=PASSAGES[0], embedding=[1.0])
        if document:
            made.relationships = {NodeRelationship.SOURCE: Document(id_=document).as_related_node_info()}
        return made

    mine.add([node("a", "a")])
    other.add([node("b", "b")])
    other.delete_nodes(["b"])  # of its document, not the whole of it
    assert served.knows(PASSAGES[0]) == [True]
    other.add([node("b", "b")])
    mine.delete("a")
    assert served.knows(PASSAGES[0]) == [True]
    other.delete_nodes(["b"])
    assert served.knows(PASSAGES[0]) == [False]
    mine.add([node("c", None)])
    assert served.knows(PASSAGES[0]) == [True]
    mine.delete_nodes(["c"])
    assert served.knows(PASSAGES[0]) == [False]


def test_ensure_all_and_what_is_retrieved(served: Served) -> None:
    store = store_of(served)
    assert store.ensure_all(nodes()[:2]) == 2 and store.ensure_all(nodes()[:2]) == 0
    index = VectorStoreIndex(nodes(), embed_model=MockEmbedding(8))
    found = index.as_retriever(similarity_top_k=5).retrieve(QUESTION)
    llm = served.llm()
    assert CacheClipPostprocessor(llm).postprocess_nodes(found, query_str=QUESTION) == found
    assert served.knows(PASSAGES[4]) == [False]
    CacheClipPostprocessor(llm, on_miss="encode").postprocess_nodes(found, query_str=QUESTION)
    assert served.knows(PASSAGES[4]) == [True]


def test_fusing_is_refused(served: Served) -> None:
    with pytest.raises(ConfigurationError, match="leave it out"):
        CacheClipTransform(served.llm(), fuse=10, embed_model=MockEmbedding(8))


# ---- tools and structured output ------------------------------------------------------------------------------------


class Person(BaseModel):
    age: int


def weather(place: str) -> str:
    """The weather at a place."""
    return f"Rain in {place}."


def test_tools(informed: Served) -> None:
    llm = informed.llm(max_new_tokens=300)
    tool = FunctionTool.from_defaults(weather)
    script(informed.engine, CALL, CALL)
    [call] = llm.get_tool_calls_from_response(llm.chat_with_tools([tool], PROMPT))
    assert (call.tool_name, call.tool_kwargs) == ("weather", {"place": "Visby"}) and reused(llm) > 100
    *_, last = llm.stream_chat_with_tools([tool], PROMPT)
    assert llm.get_tool_calls_from_response(last)[0].tool_kwargs == {"place": "Visby"}
    BACKBONE.__dict__.pop("generate")
    [forced] = llm.get_tool_calls_from_response(llm.chat_with_tools([tool], PROMPT, tool_required=True))
    assert forced.tool_name == "weather" and forced.tool_kwargs.keys() == {"place"}


async def test_an_agent(informed: Served) -> None:
    llm = informed.llm(max_new_tokens=300)
    script(informed.engine, CALL, "It rains.")
    agent = FunctionAgent(tools=[FunctionTool.from_defaults(weather)], llm=llm)
    answer = await agent.run(PROMPT)
    assert str(answer) == "It rains." and answer.tool_calls[0].tool_kwargs == {"place": "Visby"} and reused(llm) > 100


def test_structured_output(informed: Served) -> None:
    llm = informed.llm(max_new_tokens=64)
    assert isinstance(llm.structured_predict(Person, PromptTemplate(PROMPT)).age, int) and reused(llm) > 100
    *_, last = llm.stream_structured_predict(Person, PromptTemplate(PROMPT))
    assert isinstance(last.age, int)
    assert isinstance(llm.as_structured_llm(Person).complete(PROMPT).raw.age, int)


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
        CacheClipLLM(**{"base_url": "http://localhost:1", **fields})
    assert said in str(caught.value)


def test_nothing_is_asked_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of somebody else")
    llm = CacheClipLLM(base_url="http://localhost:1", kv_dir=None)
    assert llm.api_base == "http://localhost:1/v1" and llm.api_key == "none"
    assert "of somebody else" not in str(llm._get_credential_kwargs())
    with pytest.raises(ConfigurationError, match="another process"):
        llm.engine  # noqa: B018
    with pytest.raises(ConfigurationError, match="tokenizer="):
        llm.tokenizer_fn  # noqa: B018


CALLS: list[Callable[[Any], Any]] = [
    lambda llm: llm.complete(PROMPT),
    lambda llm: list(llm.stream_chat([ChatMessage(PROMPT)])),
    lambda llm: asyncio.run(llm.achat([ChatMessage(PROMPT)])),
]


@pytest.mark.parametrize("call", CALLS)
def test_errors_are_the_librarys_with_the_servers_sentence(informed: Served, call: Callable[[Any], Any]) -> None:
    for fields, status, said in (
        ({"api_key": "green"}, 401, "this server needs an API key"),
        ({"api_key": "green", "model": "tiny", "context_window": 99}, 401, "this server needs an API key"),
        ({"model": "gpt"}, 404, 'no model is called "gpt" here: it is "tiny"'),
        ({"method": "nave"}, 400, "nave"),
        ({"temperature": 0.0, "additional_kwargs": {"presence_penalty": 1}}, 400, "presence_penalty"),
    ):
        with pytest.raises(ServerError, match=said) as caught:
            call(informed.llm(**fields))
        assert caught.value.status == status
    with pytest.raises(ServerError, match=r"^http://127\.0\.0\.1:9/v1 did not answer: .*(refused|failed)") as down:
        call(informed.llm(base_url="http://127.0.0.1:9", model="tiny", context_window=99))
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
        list(informed.llm().stream_complete(PROMPT))


def test_ingestion_without_a_server_loses_no_vectors(caplog: pytest.LogCaptureFixture) -> None:
    llm = CacheClipLLM(base_url="http://127.0.0.1:9")
    store = CacheClipVectorStore(SimpleVectorStore(stores_text=False), llm, grace=0)
    made = [TextNode(id_="n", text=PASSAGES[0], embedding=[1.0])]
    assert store.add(made) == ["n"] and "chunks not encoded" in caplog.text
    store.delete_nodes(["n"])
    assert "was not dropped" in caplog.text
    with pytest.raises(ServerError, match="did not answer"):
        store.ensure_all(made)
    with pytest.raises(ServerError, match="did not answer"):  # as an engine that cannot be opened
        CacheClipTransform(llm)


def test_a_stream_without_a_report_says_so(informed: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's server, which sends none with a stream."""
    from cacheclip_rag.server.wire import Wire

    monkeypatch.setattr(Wire, "_reported", lambda self, report: {})
    llm = informed.llm()
    pieces = list(llm.stream_complete(PROMPT))
    assert "".join(piece.delta for piece in pieces)
    report = llm.last_report()
    assert "without a report" in str(report) and "without a report" in report._repr_html_()
    assert report.prompt_tokens > 100 and report.completion_tokens == 6 and report.reused == 0


def test_a_report_of_vllm_is_read(informed: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from cacheclip_rag.server.wire import Wire

    tokens = {"prefix": 5, "reused": 100, "in_place": 20, "adjusted": 10, "recomputed": 30, "fresh": 15, "edge": 4}
    given = {"method": "auto", "requested_ratio": 0.2, "fit": 0.9, "prompt_tokens": 184, "tokens": tokens, "chunks": 3}
    sent: list[dict[str, Any]] = [{**given, "fallbacks": ["one"]}, {}, {"fallbacks": ["LoRA"]}]
    monkeypatch.setattr(Wire, "_reported", lambda self, report: {"kv_transfer_params": {"cacheclip": sent.pop(0)}})
    llm = informed.llm()
    llm.complete(PROMPT)
    report = llm.last_report()
    assert (report.prefix, report.reused, report.recomputed, report.fresh) == (5, 130, 30, 19)
    assert (report.adjusted, report.edges, report.fit, report.fallbacks) == (10, 4, 0.9, ["one"])
    assert report.completion_tokens == 6 and report.cached_tokens == 135 and "first token" not in str(report)
    llm.complete(PROMPT)
    assert "nothing reused" in str(llm.last_report()) and llm.last_report().prompt_tokens > 100
    llm.complete(PROMPT)
    assert llm.last_report().fallbacks == ["LoRA"]


# ---- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_ask_the_same_server(informed: Served, copied: Callable[[Any], Any]) -> None:
    llm = informed.llm(method="naive")
    llm.complete(PROMPT)
    asyncio.run(llm.acomplete(PROMPT))
    other = copied(llm)
    assert other.complete(PROMPT).text == llm.complete(PROMPT).text and other.method == "naive"
    assert reused(other) > 100 and asyncio.run(other.acomplete(PROMPT)).raw["cacheclip"]["reused"] > 100
    for component in (CacheClipTransform(llm), CacheClipPostprocessor(llm, on_miss="encode"), store_of(informed)):
        copied(component)
    fresh = "Somebody wrote this sentence for a copy of a transform, and made it long enough to be a chunk of its own."
    copied(CacheClipTransform(llm))([TextNode(text=fresh)])
    assert informed.knows(fresh) == [True]


def test_the_key_is_not_shown(served: Served) -> None:
    llm = served.llm(api_key="blue")
    assert "blue" not in repr(llm) and "blue" not in json.dumps(CacheClipTransform(llm).to_dict())


def test_a_key_stands_for_a_tenant(informed: Served) -> None:
    other = informed.llm(api_key="blue")
    other.complete(PROMPT)
    assert reused(other) == 0
