"""The documentation: its links lead somewhere, its snippets run, its site builds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from cacheclip_rag import METHODS, Engine

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


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a document about keys in docs/, to run snippets in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    text = "Signing keys are rotated every ninety days by the operator who is on duty that week. "
    (tmp_path / "docs" / "keys.txt").write_text(text * 12)
    return tmp_path


@pytest.mark.parametrize("name", ["README.md", "docs/with-llama-index.md", "docs/with-langchain.md"])
def test_snippets_run(name: str, desk: Path, stand_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, one after the other, with a small model in the place of those they name."""
    core = pytest.importorskip("llama_index.core")
    vectors = pytest.importorskip("langchain_core.vectorstores")
    from langchain_core.embeddings import DeterministicFakeEmbedding

    monkeypatch.setattr(core.Settings, "_embed_model", core.MockEmbedding(embed_dim=8))
    found = snippets(ROOT / name)
    assert found
    names: dict[str, Any] = {
        "your_vector_store": vectors.InMemoryVectorStore(DeterministicFakeEmbedding(size=8)),
        "__name__": "snippet",
    }
    for snippet in found:
        source = re.sub(r'"(qwen2\.5-coder-[\d.]+b|smollm2-135m)-instruct"', repr(stand_in), snippet)
        exec(compile(source, name, "exec"), names)
    llm = names["llm"]
    assert llm.last_report() is None or llm.last_report().prompt_tokens > 0
    llm.handle.release() if hasattr(llm, "handle") else llm.close()


def test_snippets_without_a_framework_run(desk: Path, stand_in: str) -> None:
    names: dict[str, Any] = {}
    for snippet in snippets(ROOT / "docs" / "without-a-framework.md"):
        source = snippet.replace('"qwen2.5-coder-0.5b-instruct"', repr(stand_in))
        exec(compile(source, "without-a-framework.md", "exec"), names)
    engine = names["engine"]
    assert names["done"].encoded == 2 and names["done"].skipped == []
    assert names["answer"].report.fallbacks == [] and names["answer"].report.reused > 0
    assert not any(engine.knows(chunk) for chunk in names["chunks"])


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


def test_observability_snippets_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client")
    pytest.importorskip("opentelemetry")
    core = pytest.importorskip("llama_index.core.instrumentation")
    from tiny import tiny_backbone

    with Engine(tiny_backbone(), method="naive") as engine:
        for snippet in snippets(ROOT / "docs" / "observability.md"):
            exec(compile(snippet, "observability.md", "exec"), {"engine": engine})
        engine.generate("Hello there.", max_new_tokens=1)
        assert len(engine.observers) == 1
    core.get_dispatcher().event_handlers.pop()


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
