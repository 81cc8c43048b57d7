"""One engine over a tiny random model for most tests: float32, prefix cache on, the scheduler in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import PASSAGES, Served, save_tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def auxiliary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The auxiliary model of `served`, with other weights."""
    return save_tiny(tmp_path_factory.mktemp("auxiliary"), "qwen2", seed=1)


@pytest.fixture(scope="session")
def served(folder: Path, auxiliary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    extra = {"memory_bytes": 0, "method": "auto", "auxiliary": str(auxiliary)}  # every chunk comes from its file
    made = Served(folder, tmp_path_factory.mktemp("store"), extra=extra)
    for method in ("auto", "cacheblend", "link0"):  # one of each encoding
        made.encode(PASSAGES, method)
    yield made
    made.close()
