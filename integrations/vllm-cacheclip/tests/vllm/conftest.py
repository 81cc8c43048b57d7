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
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(
        folder, tmp_path_factory.mktemp("store"), extra={"memory_bytes": 0}
    )  # every chunk comes from its file
    for method in ("auto", "cacheblend", "link0"):  # one of each encoding
        made.encode(PASSAGES, method)
    yield made
    made.close()
