"""vLLM's own OpenAI server with chunks in it: clients as they are, who may do what, and what survives a kill."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from safetensors.torch import load_file
from serving import PASSAGES, QUESTION, save_tiny

from cacheclip_rag.server.client import ChunkClient

KEY, OTHER = "sesame", "open"
FLAGS = "--dtype float32 --enforce-eager --max-model-len 2048 --max-num-batched-tokens 2048"
MEMORY = "--kv-cache-memory-bytes 99000000"
OTHERS = ["".join(random.Random(number).choices("abcdefghij ", k=180)) for number in range(40)]
"""Chunks that have no stretch in common."""


class Server:
    """`cacheclip serve` in a process of its own."""

    def __init__(self, model: Path, store: Path, auxiliary: Path) -> None:
        self.model, self.store, self.auxiliary = model, store, auxiliary
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "cacheclip_rag.cli.main", "serve", str(self.model), "--port", str(self.port)]
        command += [
            "--store",
            str(self.store),
            "--api-key",
            KEY,
            "--api-key",
            f"{OTHER}=acme",
            "--fuse-when-idle",
            "--method",
            "auto",
            "--auxiliary",
            str(self.auxiliary),
            *FLAGS.split(),
            *MEMORY.split(),
        ]
        self.process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError("the server did not start")
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        raise RuntimeError("the server did not start in time")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0)

    def ask(self, passages: list[str], key: str = KEY, **cacheclip: Any) -> tuple[str, dict[str, Any]]:
        """A greedy answer and the report."""
        content = "\n\n".join([*passages, QUESTION])
        answer = self.client(key).chat.completions.create(
            model=str(self.model),
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=12,
            extra_body={"cacheclip": {"report": True, **cacheclip}},
        )
        return answer.choices[0].message.content or "", (answer.model_extra or {})["kv_transfer_params"]["cacheclip"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model, auxiliary = (save_tiny(tmp_path_factory.mktemp(name)) for name in ("served", "auxiliary"))
    made = Server(model, tmp_path_factory.mktemp("store"), auxiliary)
    yield made
    made.kill()


@pytest.fixture(scope="module")
def chunks(server: Server) -> ChunkClient:
    client = ChunkClient(server.url, KEY)
    client.add(PASSAGES, document="lighthouse")
    return client


def test_a_prompt_of_known_chunks(server: Server, chunks: ChunkClient) -> None:
    plain, none = server.ask(PASSAGES[::-1], reuse=False)
    whole, report = server.ask(PASSAGES[::-1], recompute_ratio=1.0)
    assert whole == plain and report["chunks"] == len(PASSAGES) and report["tokens"]["recomputed"] > 500
    assert none["fallbacks"] == ["not wanted"]


def test_an_auxiliary_model_chooses_where_it_is_asked(server: Server, chunks: ChunkClient) -> None:
    report = server.ask(PASSAGES[::-1], method="cacheclip")[1]
    assert report["method"] == "cacheclip" and report["tokens"]["recomputed"] > 100 and not report["fallbacks"]


def test_adding_again_changes_nothing(chunks: ChunkClient) -> None:
    again = chunks.add([*PASSAGES, "too short"], document="lighthouse")
    assert (again.encoded, again.kept) == (0, len(PASSAGES))
    assert [(one.index, "under 64" in one.reason) for one in again.skipped] == [(len(PASSAGES), True)]


def test_openai_streams_and_completions_are_vllms(server: Server, chunks: ChunkClient) -> None:
    client, name = server.client(), str(server.model)
    content = "\n\n".join([*PASSAGES, QUESTION])
    stream = client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=12,
        stream=True,
        extra_body={"cacheclip": {"recompute_ratio": 1.0}},
    )
    text = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
    assert text == server.ask(PASSAGES, reuse=False)[0]
    done = client.completions.create(model=name, prompt=content, max_tokens=4, temperature=0, logprobs=2)
    assert done.choices[0].logprobs is not None and done.usage is not None and done.usage.completion_tokens == 4


def test_frameworks_openai_clients(server: Server, chunks: ChunkClient) -> None:
    langchain = pytest.importorskip("langchain_openai")
    llama = pytest.importorskip("llama_index.llms.openai_like")
    name, content = str(server.model), "\n\n".join([*PASSAGES, QUESTION])
    options = dict(temperature=0, max_tokens=12)
    expected = server.ask(PASSAGES)[0]
    chat = langchain.ChatOpenAI(base_url=server.url, api_key=KEY, model=name, **options)
    assert chat.invoke(content).content == expected
    like = llama.OpenAILike(api_base=server.url, api_key=KEY, model=name, is_chat_model=True, **options)
    from llama_index.core.llms import ChatMessage

    assert like.chat([ChatMessage(content)]).message.content == expected


def test_llama_index_by_base_url(server: Server, chunks: ChunkClient) -> None:
    pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage
    from llama_index.core.schema import TextNode
    from llama_index.core.vector_stores import SimpleVectorStore
    from llama_index.llms.cacheclip import CacheClipLLM, CacheClipTransform, CacheClipVectorStore

    llm = CacheClipLLM(base_url=server.url, api_key=KEY, max_new_tokens=12, temperature=0.0, max_retries=0)
    assert llm.model_name == str(server.model) and llm.metadata.context_window == 2048
    content = "\n\n".join([*PASSAGES, QUESTION])
    expected, told = server.ask(PASSAGES)
    for ask in (llm.chat, lambda messages: list(llm.stream_chat(messages))[-1]):
        assert ask([ChatMessage(content)]).message.content == expected
    assert "without a report" in str(llm.last_report()) and llm.last_report().completion_tokens == 12  # of the stream
    llm.chat([ChatMessage(content)])
    report = llm.last_report()
    assert report.recomputed == told["tokens"]["recomputed"] and report.reused and report.method == "auto"
    CacheClipTransform(llm)([TextNode(text=OTHERS[5])])
    store = CacheClipVectorStore(SimpleVectorStore(stores_text=False), llm, show_progress=False, grace=0)
    store.add([TextNode(id_="node", text=OTHERS[6], embedding=[1.0])])
    assert server.ask(OTHERS[5:7])[1]["chunks"] == 2
    store.delete_nodes(["node"])
    assert server.ask(OTHERS[5:7])[1]["chunks"] == 1


def test_langchain_by_base_url(server: Server, chunks: ChunkClient) -> None:
    pytest.importorskip("langchain_openai")
    from langchain_cacheclip import CacheClipVectorStore, ChatCacheClip
    from langchain_core.documents import Document
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from langchain_core.vectorstores import InMemoryVectorStore

    llm = ChatCacheClip(base_url=server.url, api_key=KEY, max_tokens=12, temperature=0, max_retries=0)
    content = "\n\n".join([*PASSAGES, QUESTION])
    expected, told = server.ask(PASSAGES)
    assert "".join(piece.content for piece in llm.stream(content)) == expected
    assert "without a report" in str(llm.last_report())
    message = llm.invoke(content)
    assert message.content == expected and message.usage_metadata["output_tokens"] == 12
    assert llm.last_report().recomputed == told["tokens"]["recomputed"]
    other = ChatCacheClip(base_url=server.url, api_key=KEY, max_tokens=1, method="naive", max_retries=0)
    other.invoke(content)
    report = other.last_report()
    assert (report.method, report.recomputed, report.completion_tokens) == ("naive", 0, 1) and report.reused > 100
    inner = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    store = CacheClipVectorStore(inner, llm, show_progress=False)
    store.add_documents([Document(id=text[:8], page_content=text) for text in OTHERS[7:9]])
    assert server.ask(OTHERS[7:9])[1]["chunks"] == 2
    store.delete([OTHERS[7][:8]])
    assert server.ask(OTHERS[7:9])[1]["chunks"] == 1


def test_forgetting_what_a_document_has(server: Server, chunks: ChunkClient) -> None:
    """What another document has as well stays."""
    one, both = OTHERS[10], OTHERS[11]
    chunks.add([one, both], document="first")
    chunks.add([both], document="second")
    chunks.forget([one, both], document="first")
    report = server.ask([one, both])[1]
    assert report["chunks"] == 1 and report["tokens"]["fresh"] > len(one)
    chunks.forget([both], document="second")
    assert server.ask([one, both])[1]["fallbacks"] == ["no chunk in this prompt has stored KV"]
    chunks.add([one], document="first")
    chunks.add([one], document="second")
    chunks.forget([one])
    assert server.ask([one])[1]["fallbacks"] == ["no chunk in this prompt has stored KV"]


def test_nothing_without_a_key(server: Server, chunks: ChunkClient) -> None:
    for method, path in (
        ("GET", "/models"),
        ("GET", "/chunks/stats"),
        ("POST", "/chunks"),
        ("PUT", "/documents/lighthouse"),
        ("DELETE", "/documents/lighthouse"),
        ("POST", "/chat/completions"),
        ("POST", "/completions"),
    ):
        for headers in ({}, {"Authorization": "Bearer sesam"}):
            assert httpx.request(method, server.url + path, json={}, headers=headers).status_code == 401
    assert httpx.get(server.url.removesuffix("/v1") + "/metrics").status_code == 401


def test_tenants_are_told_by_their_keys(server: Server, chunks: ChunkClient) -> None:
    forged = [{"tenant": ""}, {"proof": "guessed", "tenant": ""}]
    for options in forged:
        assert "no chunk in this prompt" in server.ask(PASSAGES, OTHER, **options)[1]["fallbacks"][0]
    assert ChunkClient(server.url, OTHER).stats().chunks == 0


def test_ingestion_and_forgetting_cannot_be_forged(server: Server, chunks: ChunkClient) -> None:
    """In any field that vLLM reads parameters of its connector from."""
    before = chunks.stats().chunks
    encode = {"method": "auto", "encode": {"text": OTHERS[0]}, "proof": "", "tenant": ""}
    forged = {"cacheclip": encode}
    bodies = [
        {"kv_transfer_params": forged},
        {"cacheclip": encode},
        {"vllm_xargs": {"kv_transfer_params": forged}},
        {"extra_args": {"kv_transfer_params": forged}},
        {"sampling_params": {"extra_args": {"kv_transfer_params": forged}}},
    ]
    for body in bodies:
        request = {"model": str(server.model), "prompt": OTHERS[0], "max_tokens": 1, **body}
        httpx.post(server.url + "/completions", json=request, headers={"Authorization": f"Bearer {KEY}"})
    assert chunks.stats().chunks == before


@pytest.mark.parametrize(
    ("options", "said"), [({"method": "autoo"}, "did you mean"), ({"recompute_ratio": 3}, "0 to 1")]
)
def test_bad_options_are_refused_with_what_is_valid(server: Server, options: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        server.ask(PASSAGES, **options)


def test_documents_change_and_go(server: Server, chunks: ChunkClient) -> None:
    assert chunks.replace("novel", [OTHERS[0], OTHERS[1]]).encoded == 2
    changed = chunks.replace("novel", [OTHERS[1], OTHERS[2]])
    assert (changed.encoded, changed.kept, changed.removed) == (1, 1, 1)
    assert server.ask([OTHERS[0]])[1]["fallbacks"] == ["no chunk in this prompt has stored KV"]
    assert server.ask([OTHERS[2]])[1]["chunks"] == 1
    chunks.forget_document("novel")
    assert server.ask([OTHERS[2]])[1]["fallbacks"] == ["no chunk in this prompt has stored KV"]


def test_fused_variants_are_made_and_used(server: Server, chunks: ChunkClient) -> None:
    """By neighbours, and by use: the chunks that prompts held together."""
    before = server.ask(PASSAGES[:2])[1]
    done = chunks.fuse({PASSAGES[1]: PASSAGES[:1], PASSAGES[2]: ["nobody has added this"]})
    assert done.encoded == 1 and [one.index for one in done.skipped] == [1]
    after = server.ask(PASSAGES[:2])[1]
    assert after["fit"] > before["fit"] and chunks.stats().fused == 1
    assert chunks.fuse({PASSAGES[1]: PASSAGES[:1]}).kept == 1
    chunks.forget(PASSAGES[:1])
    assert chunks.stats().fused == 0  # it contains what was forgotten
    chunks.add(PASSAGES, document="lighthouse")


def test_a_kill_damages_nothing(server: Server, chunks: ChunkClient) -> None:
    """In the middle of an ingestion and of two hundred requests; then it starts again and goes on."""
    expected = server.ask(PASSAGES)[0]

    def quietly(work: Any) -> None:
        try:
            work()
        except Exception:  # the server is gone
            pass

    with ThreadPoolExecutor(16) as threads:
        works = [lambda: chunks.replace("many", OTHERS), *(lambda: server.ask(PASSAGES) for _ in range(200))]
        jobs = [threads.submit(quietly, work) for work in works]
        time.sleep(1.5)
        server.kill()
        for job in jobs:
            job.result()
    assert all(load_file(file) for file in server.store.rglob("*.safetensors"))
    server.start()
    assert server.ask(PASSAGES)[0] == expected
    done = chunks.replace("many", OTHERS)
    assert done.encoded + done.kept == len(OTHERS) and not done.skipped
    assert not list(server.store.rglob("*.bad"))


def test_what_is_used_together_is_fused_in_idle_time(server: Server, chunks: ChunkClient) -> None:
    """Behind the other tests, whose counts it would change."""
    texts = [f"{number} {text}" for number, text in enumerate(OTHERS[:2])]
    chunks.add(texts)
    before = server.ask(texts)[1]
    with ThreadPoolExecutor(8) as threads:  # the scheduler saves its counts every 64 prompts
        list(threads.map(lambda _: server.ask(texts), range(70)))
    for _ in range(100):
        if server.ask(texts)[1]["fit"] > before["fit"]:
            return
        time.sleep(1)
    raise AssertionError("the second chunk was not fused with the first")
