"""`cacheclip bench`, on a tiny model: what it compares, not how fast it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cacheclip_eval import bench
from tiny import tiny_backbone
from typer.testing import CliRunner

from cacheclip_rag import Engine
from cacheclip_rag.cli import main as cli


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_backbone("qwen2"), method="query_guided")


def test_at_ratio_one_it_is_the_full_prefill(engine: Engine) -> None:
    result = bench.run(engine, chunks=3, tokens=100, pairs=2, ratio=1.0)
    assert result.kl == pytest.approx(0.0, abs=1e-6) and result.same_first_token == result.pairs == 2
    assert result.kl_naive > 1e-4  # plain reuse of chunks is something else, so the comparison can tell


def test_chunks_are_of_the_length_asked_for_and_reused(engine: Engine) -> None:
    texts = bench.passages(engine, 3, 1500, seed=5)
    lengths = [len(engine.backbone.tokenise(text)) for text in texts]
    assert len(set(texts)) == 3 and all(1200 < length < 1800 for length in lengths)
    assert bench.passages(engine, 3, 1500, seed=5) == texts != bench.passages(engine, 3, 1500, seed=6)
    result = bench.run(engine, chunks=3, tokens=400, pairs=1, ratio=0.1)
    assert result.bound > 2 and result.prompt_tokens > 900
    assert result.times_sooner == pytest.approx(result.full_prefill_s / result.reuse_s)


def test_progress_never_stands_still(engine: Engine) -> None:
    """Every chunk and every prefill is one step, and the last one is the end."""
    seen: list[tuple[str, int, int]] = []
    bench.run(engine, chunks=2, tokens=80, pairs=1, progress=lambda *step: seen.append(step))
    assert [(done, steps) for _, done, steps in seen] == [(n, 10) for n in range(10)]
    assert seen[0][0] == "warming up: reading its chunks" and seen[-1][0] == "prompt 1 of 1: plain reuse"


def test_the_model_is_given_back_as_it_was(engine: Engine) -> None:
    before = engine.generate("Hello.", max_new_tokens=4).ids
    bench.run(engine, chunks=2, tokens=80, pairs=1)
    assert engine.generate("Hello.", max_new_tokens=4).ids == before  # it raises where the attention is another's


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    monkeypatch.setattr("cacheclip_rag.engine.Engine", lambda *_, **__: engine)
    words = ["bench", "--chunks", "2", "--tokens", "80", "--pairs", "1"]
    result = CliRunner().invoke(cli.app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert row["method"] == "query_guided" and row["model"] == "smollm2-135m-instruct" and "torch" in row["machine"]
    shown = CliRunner().invoke(cli.app, words)
    assert "times faster" in shown.stdout and "KL to full prefill" in shown.stdout
