"""Fixtures of all tests of the core."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

from stores import open_disk
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import Engine
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.store import DiskStore, disk


@pytest.fixture
def engine() -> Engine:
    """It knows `PASSAGES`."""
    engine = Engine(tiny_backbone(), method="query_guided", recompute_ratio=0.2)
    engine.ensure(PASSAGES)
    return engine


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    """An empty store on disk, without a cap."""
    return open_disk(tmp_path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the disk store's clock on, by so many seconds."""
    now = [time.time()]
    monkeypatch.setattr(disk, "time", SimpleNamespace(time=lambda: now[0], time_ns=lambda: int(now[0] * 1e9)))

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


@pytest.fixture(scope="session")
def smollm2() -> Backbone:
    """The real SmolLM2-135M-Instruct, float32, from the package index or the hub."""
    from cacheclip_rag.weights.pull import resolve

    return Backbone.load(resolve("smollm2-135m-instruct"), dtype="float32")


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small random model that has SmolLM2's tokenizer and number of heads, for whole applications."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from cacheclip_rag.weights.pull import resolve

    folder = tmp_path_factory.mktemp("stand-in")
    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2-135m-instruct"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=36,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=4,
        max_position_embeddings=8192,
        initializer_range=0.25,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
