"""The documentation: its links lead somewhere, its snippets run, its site builds."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import METHODS, Engine
from cacheclip_rag.methods import table
from cacheclip_rag.store.admin import Administration
from cacheclip_rag.weights.catalogue import CATALOGUE
from cacheclip_rag.weights.pull import resolve

ROOT = Path(__file__).parent.parent
PATTERNS = ("*.md", "docs/*.md", "integrations/*/README.md", "examples/**/*.md")
PAGES = sorted(page for pattern in PATTERNS for page in ROOT.glob(pattern))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def snippets(page: Path) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language == "python"]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT)
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_are_python(page: Path) -> None:
    for snippet in snippets(page):
        ast.parse(snippet)


def test_every_promise_of_the_store_names_the_tests_that_prove_it() -> None:
    text = (ROOT / "docs" / "store.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    promises = re.split(r"^\*\*P(\d+)\.", text.partition("\n`make torture`")[0], flags=re.MULTILINE)
    assert promises[1::2] == [str(number) for number in range(1, 17)]
    for number, promise in zip(promises[1::2], promises[2::2], strict=True):
        named = re.findall(r"`(test_\w+)`", promise)
        assert named, f"P{number} names no test"
        for name in named:
            found = re.findall(rf"^(?:def {name}\(|{name} = )", tests, re.MULTILINE)
            assert len(found) == 1, f"P{number}: {len(found)} tests are called {name}"


# ---- snippets, exactly as they are printed --------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: str) -> Path:
    """A folder with a document about keys in docs/, where a small random model goes by the names of the language models
    in the catalogue. The sentence embeddings are the real ones.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    text = "Signing keys are rotated every ninety days by the operator who is on duty that week. "
    (tmp_path / "docs" / "keys.txt").write_text(text * 12)
    models = tmp_path / "home" / "models"
    models.mkdir(parents=True)
    for name in CATALOGUE:
        if name == "all-minilm-l6-v2":
            (models / name).symlink_to(resolve(name))
        else:
            shutil.copytree(stand_in, models / name)
            (models / name / "cacheclip.json").write_text("{}")
    monkeypatch.setenv("CACHECLIP_HOME", str(tmp_path / "home"))
    return tmp_path


def run_snippets(page: str, **names: Any) -> dict[str, Any]:
    """One after the other, with what a page takes for granted under the ``names`` that it uses; what they leave."""
    found = snippets(ROOT / page)
    assert found
    names["__name__"] = "snippet"
    for snippet in found:
        exec(compile(snippet, page, "exec"), names)
    return names


@pytest.mark.parametrize(
    "page", ["README.md", "docs/with-llama-index.md", "integrations/llama-index-llms-cacheclip/README.md"]
)
def test_snippets_with_llama_index_run(page: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = pytest.importorskip("llama_index.core")
    pytest.importorskip("sentence_transformers")
    monkeypatch.setattr(core.Settings, "_embed_model", None)
    llm = run_snippets(page)["llm"]
    assert llm.last_report().prompt_tokens > 0 and llm.last_report().fallbacks == []
    llm.handle.release()


def test_snippets_with_langchain_run(desk: Path) -> None:
    vectors = pytest.importorskip("langchain_core.vectorstores")
    from langchain_core.embeddings import DeterministicFakeEmbedding

    store = vectors.InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    llm = run_snippets("docs/with-langchain.md", your_vector_store=store)["llm"]
    assert llm.last_report().prompt_tokens > 0
    llm.close()


def test_snippets_of_the_langchain_package_run(desk: Path) -> None:
    pytest.importorskip("langchain_chroma")
    pytest.importorskip("langchain_classic")
    from langchain_core.documents import Document
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from langchain_core.prompts import ChatPromptTemplate

    llm = run_snippets(
        "integrations/langchain-cacheclip/README.md",
        embeddings=DeterministicFakeEmbedding(size=8),
        chunks=[Document(page_content=(desk / "docs" / "keys.txt").read_text())],
        prompt=ChatPromptTemplate.from_template("{context}\n\n{input}"),
    )["llm"]
    assert llm.last_report().reused > 0
    llm.close()


def test_snippets_without_a_framework_run(desk: Path) -> None:
    names = run_snippets("docs/without-a-framework.md")
    engine = names["engine"]
    assert names["done"].encoded == 2 and names["done"].skipped == []
    assert names["answer"].report.fallbacks == [] and names["answer"].report.reused > 0
    assert not any(engine.knows(chunk) for chunk in names["chunks"])


def test_weights_snippets_run(desk: Path) -> None:
    assert run_snippets("docs/weights.md")["model"].config.num_hidden_layers == 6


def test_snippets_of_the_server_run(stand_in: str) -> None:
    from http_server import serving

    from cacheclip_rag.server.app import app
    from cacheclip_rag.server.embedded import Engines

    names: dict[str, Any] = {}
    with serving(app(Engines(lambda tenant: Engine(stand_in, tenant=tenant)), stand_in)) as url:
        for snippet in snippets(ROOT / "docs" / "http-server.md"):
            source = snippet.replace('"qwen2.5-coder-0.5b-instruct"', repr(stand_in))
            exec(compile(source.replace("http://localhost:8000/v1", url), "http-server.md", "exec"), names)
    assert (names["done"].encoded, names["done"].skipped) == (2, [])
    assert names["answer"].kv_transfer_params["cacheclip"]["reused"] > 0


def test_observability_snippets_run() -> None:
    pytest.importorskip("prometheus_client")
    pytest.importorskip("opentelemetry")
    core = pytest.importorskip("llama_index.core.instrumentation")
    with Engine(tiny_backbone(), method="naive") as engine:
        run_snippets("docs/observability.md", engine=engine)
        engine.generate("Hello there.", max_new_tokens=1)
        assert len(engine.observers) == 1
    core.get_dispatcher().event_handlers.pop()


class Opened:
    """`Engine` for snippets that open one and do not close it."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []

    def __call__(self, *given: Any, **options: Any) -> Engine:
        self.engines.append(Engine(*given, **options))
        return self.engines[-1]


@pytest.fixture
def opened() -> Iterator[Opened]:
    opened = Opened()
    yield opened
    for engine in opened.engines:
        engine.close()


def test_snippets_about_methods_run(opened: Opened) -> None:
    texts = list(PASSAGES)
    with Engine(tiny_backbone(), auxiliary=tiny_backbone()) as engine:
        engine.ensure(texts)
        run_snippets(
            "docs/methods.md",
            Engine=opened,
            model=tiny_backbone(),
            engine=engine,
            prompt="\n\n".join([*texts, "Who was on duty?"]),
            texts=texts,
            text=texts[1],
            prompts=[texts[:3]],
            embed=lambda texts: np.eye(len(texts), dtype=np.float32) + 0.1,
        )
        assert engine.fused(texts[1]) and opened.engines[0].method.name == "query_guided"


def test_snippets_about_the_store_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.chdir(tmp_path)
    bucket = f"file://{tmp_path / 'bucket'}"
    with Engine(tiny_backbone(), method="naive") as engine:
        run_snippets(
            "docs/store.md", Engine=opened, model=tiny_backbone(), engine=engine, chunks=PASSAGES, bucket=bucket
        )
        assert not engine.knows(PASSAGES[0]) and len(opened.engines) == 2


def test_snippets_about_security_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    monkeypatch.setenv("CACHECLIP_SECRET", "a secret")
    share = tmp_path / "share"
    run_snippets("docs/security.md", Engine=opened, model=tiny_backbone(), share=share, os=os)
    opened.engines[0].ensure(PASSAGES[:1])
    assert all(found.about["keyed"] for found in Administration(share).usage())


def test_snippets_about_trouble_run() -> None:
    runnables = pytest.importorskip("langchain_core.runnables")
    from langchain_core.documents import Document
    from langchain_core.prompts import ChatPromptTemplate

    asked: list[str] = []
    [snippet] = snippets(ROOT / "docs/troubleshooting.md")
    names = {
        "RunnablePassthrough": runnables.RunnablePassthrough,
        "retriever": runnables.RunnableLambda(lambda _: [Document("one"), Document("two")]),
        "prompt": ChatPromptTemplate.from_template("{context}: {question}"),
        "llm": lambda prompt: asked.append(prompt.to_string()),
    }
    eval(snippet, names).invoke("Three?")
    assert asked == ["Human: one\n\ntwo: Three?"]


def test_a_method_from_another_package_is_registered_as_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from cacheclip_rag.methods.select.random import Random

    monkeypatch.setattr(table, "METHODS", dict(METHODS))
    run_snippets("CONTRIBUTING.md", MySelector=Random)
    assert "mine" in table.METHODS


def test_every_page_with_snippets_is_run() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        named = f'"{name}"' in source or f'"{page.name}"' in source
        assert named or not snippets(page), f"no test runs the snippets of {name}"


def test_each_method_has_a_page_of_its_own() -> None:
    sys.path.insert(0, str(ROOT / "tools" / "scripts"))
    try:
        from method_pages import main, pages
    finally:
        sys.path.pop(0)
    assert main(check=True) == 0
    made = pages()
    assert list(made) == [f"methods/{name}.md" for name in METHODS]
    assert "arXiv 2405.16444" in made["methods/cacheblend.md"]
    assert "| `group_size` | `8` |" in made["methods/cacheclip.md"]
    assert "APE" in made["methods/ape.md"] and "Positions: shared" in made["methods/ape.md"]


def test_every_method_and_command_is_in_the_docs() -> None:
    from typer.main import get_command

    from cacheclip_rag.cli.main import app

    overview = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [name for name in METHODS if f"| `{name}` |" not in overview] == []
    commands = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert [name for name in get_command(app).commands if f"`{name}" not in commands] == []  # type: ignore[attr-defined]


def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly: a link that leads nowhere, or a name that the reference does not find, is an error."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    site = tmp_path / "site"
    for page in ("index.html", "methods/cacheclip/index.html", "reference/index.html", "images/report-light.png"):
        assert (site / page).exists()
    assert "recompute_ratio" in (site / "reference" / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', (site / "index.html").read_text())
    assert loaded == []  # it works without a network
