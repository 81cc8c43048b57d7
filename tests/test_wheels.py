"""What would be published: every distribution is built, installed into an empty environment, and used there.

Only the distributions themselves are installed, so that no index is asked. What they depend on is in this environment,
whose packages the empty one sees behind its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
MADE = {
    "cacheclip_rag": ["cacheclip_rag", "tools/cacheclip_app", "tools/cacheclip_eval", "tools/cacheclip_train"],
    "langchain_cacheclip": ["integrations/langchain-cacheclip/langchain_cacheclip"],
    "llama_index_llms_cacheclip": ["integrations/llama-index-llms-cacheclip/llama_index"],
    "vllm_cacheclip": ["integrations/vllm-cacheclip/cacheclip_vllm"],
}
"""The folders of packages in each distribution."""

USE = """
import json, sys

import cacheclip_app, cacheclip_eval, cacheclip_rag, cacheclip_train, langchain_cacheclip
import llama_index.llms.cacheclip, llama_index.postprocessor.cacheclip
from langchain_cacheclip import ChatCacheClip
from llama_index.llms.cacheclip import CacheClipLLM

modules = [cacheclip_app, cacheclip_eval, cacheclip_rag, cacheclip_train, langchain_cacheclip]
modules += [llama_index.llms.cacheclip, llama_index.postprocessor.cacheclip]
chunk = "Signing keys are rotated every ninety days by the operator who is on duty that week. " * 2
found = {}
for llm in (CacheClipLLM(sys.argv[1], max_new_tokens=2), ChatCacheClip(sys.argv[1], max_tokens=2)):
    llm.engine.ensure([chunk])
    ask = llm.complete if isinstance(llm, CacheClipLLM) else llm.invoke
    ask(f"{chunk}\\n\\nHow often are keys rotated?")
    report = llm.last_report()
    found[type(llm).__name__] = [report.reused, report.fallbacks, "<style>" in report._repr_html_()]
print(json.dumps({"files": [module.__file__ for module in modules], "found": found}))
"""


def run(*command: object, cwd: Path | None = None) -> str:
    """What it prints."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def listed() -> list[str]:
    """The folders that `make wheels` builds."""
    [folders] = re.findall(
        r"^DISTRIBUTIONS = (.*)$", (ROOT / "Makefile").read_text("utf-8").replace("\\\n", " "), re.MULTILINE
    )
    return folders.split()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Those that are built from the source distributions, by name."""
    dist = tmp_path_factory.mktemp("dist")
    for folder in listed():
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ROOT / folder)
    assert len(list(dist.glob("*.tar.gz"))) == len(listed())
    return {wheel.name.partition("-")[0]: wheel for wheel in dist.glob("*.whl")}


@pytest.fixture(scope="module")
def fresh(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheels, but for the one that needs vLLM; behind them, the packages of this one."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "-q"]
    run(*pip, "--no-index", "--no-deps", *(wheels[name] for name in MADE if name != "vllm_cacheclip"))
    [packages] = home.glob("lib/python*/site-packages")
    here = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (packages / "behind.pth").write_text("\n".join(here))  # whose own .pth files, of editable installs, are not read
    return home


def test_make_builds_every_distribution(wheels: dict[str, Path]) -> None:
    projects = [ROOT / "pyproject.toml", *ROOT.glob("integrations/*/pyproject.toml")]
    assert sorted(project.parent for project in projects) == sorted((ROOT / folder).resolve() for folder in listed())
    assert sorted(wheels) == sorted(MADE)


@pytest.mark.parametrize("name", MADE)
def test_a_wheel_holds_its_packages_and_nothing_else(name: str, wheels: dict[str, Path]) -> None:
    held = {entry for entry in zipfile.ZipFile(wheels[name]).namelist() if ".dist-info/" not in entry}
    meant = set[str]()
    for folder in (ROOT / folder for folder in MADE[name]):
        files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        meant |= {path.relative_to(folder.parent).as_posix() for path in files}
    assert held == meant and any(entry.endswith("/py.typed") for entry in held)


@pytest.mark.parametrize("name", MADE)
def test_what_a_wheel_requires_is_what_it_was_tested_with(name: str, wheels: dict[str, Path]) -> None:
    wheel = wheels[name]
    archive = zipfile.ZipFile(wheel)
    [entry] = [entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA")]
    about = Parser().parsestr(archive.read(entry).decode())
    assert about["License-Expression"] == "Apache-2.0" and about["Summary"] and about.get_payload()
    own = {made.replace("_", "-"): wheels[made].name.split("-")[1] for made in MADE}
    for requirement in map(Requirement, about.get_all("Requires-Dist")):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found = own.get(requirement.name) or version(requirement.name)
            assert requirement.specifier.contains(found, prereleases=True), requirement


def test_wheels_work_in_an_empty_environment(fresh: Path, stand_in: str, tmp_path: Path) -> None:
    for needed in ("llama_index.readers.file", "langchain_core", "chromadb", "sentence_transformers"):
        pytest.importorskip(needed)
    python = (fresh / "bin" / "python", "-I")  # with nothing of this checkout on its path
    told = json.loads(run(*python, "-c", USE, stand_in, cwd=tmp_path).splitlines()[-1])
    assert [file for file in told["files"] if not Path(file).is_relative_to(fresh)] == []
    for name, (reused, fallbacks, styled) in told["found"].items():
        assert reused > 0 and fallbacks == [] and styled, name

    cacheclip = (*python, fresh / "bin" / "cacheclip")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "keys.txt").write_text("Signing keys are rotated every ninety days by who is on duty. " * 3)
    ingested = json.loads(run(*cacheclip, "ingest", "docs", "--model", stand_in, "--json", cwd=tmp_path))
    assert ingested["kept"] == ingested["chunks"] == 1
    asked = json.loads(run(*cacheclip, "ask", "How often are keys rotated?", "--tokens", 1, "--json", cwd=tmp_path))
    assert asked["sources"] == ["keys.txt"] and asked["report"]["reused"] > 0
