"""A chunk whose loading takes longer than computing it is computed, by the library's own rule."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from serving import PASSAGES, Served

from cacheclip_rag.chunks import ChunkKV
from cacheclip_rag.store import DiskStore, LoadingCost
from cacheclip_rag.store.loading_cost import DISK

LONG = ["Ferries to Brannock leave at seven, ten and four; in winter none sails when the wind is above eight. " * 8]


@pytest.fixture
def cost(served: Served) -> Iterator[LoadingCost]:
    """What the worker has measured: nothing so far, and nothing when the test is over."""
    _, worker = served.connectors()
    LoadingCost.__init__(worker._libraries.cost)
    yield worker._libraries.cost
    LoadingCost.__init__(worker._libraries.cost)


def slow(cost: LoadingCost, per_byte: float) -> None:
    for _ in range(9):
        cost.loaded(DISK, 1, per_byte)
        cost.computed(1000, 1e-6)


def plain(served: Served, ids: list[int]) -> list[int]:
    return served.ask([ids], reuse=False)[0][0]


def test_loads_and_passes_are_measured_as_they_happen(served: Served, cost: LoadingCost) -> None:
    prompts = [served.prompt(PASSAGES[k:] + PASSAGES[:k]) for k in range(4)]
    assert cost.why_computed(DISK, 1 << 50, 1) is None
    for ids in prompts:
        served.ask([ids], recompute_ratio=0.5)
    assert cost.why_computed(DISK, 1 << 50, 1) is not None


def test_slow_chunks_are_computed_and_the_others_reused(
    served: Served, cost: LoadingCost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer does not wait for a file that is not worth it, and is that of vLLM."""
    served.encode(LONG)
    ids = served.prompt([*PASSAGES[:3], *LONG])
    expected = plain(served, ids)
    sizes = {entry.text: entry.nbytes for entry in store_of(served).entries() if not entry.context}
    text = LONG[0].strip()
    slow(cost, 0.019 / max(sizes[passage.strip()] for passage in PASSAGES))  # below what is worth a thought
    read, held, key = DiskStore.get, threading.Event(), library_of(served).key(text)

    def get(self: Any, wanted: str) -> ChunkKV | None:
        assert wanted != key or held.wait(60)
        return read(self, wanted)

    monkeypatch.setattr(DiskStore, "get", get)
    [(answer, report)] = served.ask([ids], recompute_ratio=1.0)
    assert not held.is_set() and answer == expected
    assert report["chunks"] == 4 and report["tokens"]["recomputed"] > 0
    [reason] = report["fallbacks"]
    assert "loading it from disk takes longer than computing it" in reason
    held.set()
    store_of(served)._later.flush()


def test_a_prompt_of_slow_chunks_is_vllms(served: Served, cost: LoadingCost) -> None:
    ids = served.prompt(PASSAGES)
    expected = plain(served, ids)
    slow(cost, 1.0)
    [(answer, report)] = served.ask([ids])
    assert "loading it from disk takes longer than computing it" in report["fallbacks"][0] and answer == expected
    scheduler, worker = served.connectors()
    served.ask([ids], reuse=False)  # workers are told of the last ones with the next step
    assert not any({**scheduler.held(), **worker.held()}.values())
    store_of(served)._later.flush()


def test_a_context_is_loaded_however_long_it_takes(served: Served, cost: LoadingCost) -> None:
    """The chunk is to be computed behind it."""
    text = "Timetables of the Brannock ferries hang in the harbour office, next to the tide tables of the year. " * 2
    slow(cost, 1.0)
    served.encode([text], context=PASSAGES[:1])
    contexts = {entry.context for entry in store_of(served).entries() if entry.text == text.strip()}
    assert contexts == {(PASSAGES[0].strip(),)}


def library_of(served: Served) -> Any:
    _, worker = served.connectors()
    return worker._libraries.of("", worker._settings.default.encode)


def store_of(served: Served) -> Any:
    return library_of(served).store
