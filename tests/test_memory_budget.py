"""All KV that an engine keeps in memory, of whatever kind, is within ``memory_bytes``; any of it may go at any time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import Engine
from cacheclip_rag.kv.encode import HarvestedVariants
from cacheclip_rag.kv.prefix_caching import DocumentTree, PrefixBlocks
from cacheclip_rag.model.canvas import Canvas
from cacheclip_rag.store import LRUCache, MemoryBudget

KINDS = ["chunks", "harvested variants", "prefix caches", "preambles"]
METHODS = ["naive", "prefix-cache", "ragcache", "cachecraft", "auto"]
ALL = {"auto": 1 - 1e-13}
"""A ratio at which a method recomputes whatever is not where it was computed, without the short cut that 1 takes."""
SYSTEM = "You answer from the passages below, briefly, and you say so when they do not tell.\n\n"


def prompt(*numbers: int, system: str = SYSTEM) -> str:
    return system + "\n\n".join(PASSAGES[n % len(PASSAGES)] for n in numbers) + "\n\nWho built it?"


def budget(engine: Engine) -> MemoryBudget:
    return engine.collections._place.memory


def ask(engine: Engine, method: str, *numbers: int, **options: Any) -> torch.Tensor:
    return engine.prefill(prompt(*numbers, **options), method=method).logits


def ask_all(engine: Engine, watch: Callable[[], object]) -> None:
    for round in range(2):
        for method in METHODS:
            for numbers in ((0, 1), (1, 2), (2, 0, 1), (0, 1)):
                ask(engine, method, *numbers, system=f"{round * SYSTEM}{SYSTEM}")
                watch()


def needed() -> tuple[int, dict[str, int]]:
    """What a day's requests leave where everything has room."""
    with Engine(tiny_backbone()) as engine:
        engine.ensure(PASSAGES)
        ask_all(engine, lambda: None)
        return budget(engine).nbytes, engine.stats().memory


def test_all_kinds_together_keep_to_memory_bytes_and_give_way_to_one_another() -> None:
    total, by_kind = needed()
    assert sorted(by_kind) == sorted(KINDS) and total == sum(by_kind.values())
    seen = set[str]()
    for share in (2, 5, 20):
        with Engine(tiny_backbone(), memory_bytes=total // share) as engine:
            engine.ensure(PASSAGES)

            def watch(engine: Engine = engine, cap: int = total // share) -> None:
                memory = engine.stats().memory
                assert 0 < sum(memory.values()) <= cap
                seen.update(memory)

            ask_all(engine, watch)
            assert engine.stats().fallbacks.get("full prefill", 0) == 0
    assert seen == set(KINDS)


def test_nothing_is_kept_where_nothing_fits_and_all_is_answered() -> None:
    with Engine(tiny_backbone(), memory_bytes=0) as engine:
        engine.ensure(PASSAGES)
        ask_all(engine, lambda: None)
        assert engine.stats().memory == {} and engine.prefill(prompt(0), method="ragcache").report.prefix == 0


def test_what_was_used_longest_ago_goes_whichever_kind_it_is() -> None:
    backbone = tiny_backbone()
    canvas = backbone.canvas(32)
    canvas.keys.zero_(), canvas.values.zero_()
    size = sum(t.nbytes for t in canvas.read(slice(0, 32)))
    memory = MemoryBudget(3 * size)
    chunks = LRUCache[str, object](memory, "chunks")
    blocks, tree = PrefixBlocks(block=32).open(memory), DocumentTree().open(memory)
    ids, more = torch.arange(32), torch.arange(33)

    def held() -> tuple[bool, bool, bool]:
        return bool(chunks.nbytes), bool(blocks.nbytes), bool(tree.nbytes)

    uses: list[Callable[[], object]] = [
        lambda: chunks.get("a"),
        lambda: blocks.longest(more, []),
        lambda: tree.longest(ids, [32]),
    ]
    for oldest in range(3):
        chunks.put("a", object(), size)
        blocks.keep(ids, [], canvas, 1.0)
        tree.keep(ids, [32], canvas, 1.0)
        assert held() == (True, True, True) and memory.by_kind() == {"chunks": size, "prefix caches": 2 * size}
        for use in uses[oldest + 1 :] + uses[:oldest]:
            use()
        other = LRUCache[int, object](memory, "preambles")
        other.put(0, object(), size)
        assert [n for n, there in enumerate(held()) if not there] == [oldest] and memory.nbytes == memory.cap
        del other


@pytest.mark.parametrize("method", METHODS)
def test_what_is_evicted_in_mid_use_breaks_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is looked up is gone at once, as if other requests had filled the memory meanwhile."""
    with Engine(tiny_backbone()) as engine:
        memory, caching = budget(engine), engine.recipe(method).prefix_cache
        looking: list[tuple[Any, str]] = [(LRUCache, "get"), (HarvestedVariants, "__contains__"), (Canvas, "read")]
        if caching is not None:
            looking.append((type(engine.collections.prefix_cache(caching)), "longest"))

        def then_gone(inner: Callable[..., Any]) -> Callable[..., Any]:
            def looked(*given: Any) -> Any:
                found = inner(*given)
                with memory.lock:
                    cap, memory.cap = memory.cap, 0
                    memory.shrink()
                    memory.cap = cap
                return found

            return looked

        for numbers in ((0, 1), (1,), (2, 1, 0)):
            engine.ensure(PASSAGES)
            full = [ask(engine, each, *numbers) for each in (method, method, "full")][-1]
            with monkeypatch.context() as patch:
                for owner, name in looking:
                    patch.setattr(owner, name, then_gone(getattr(owner, name)))
                result = engine.prefill(prompt(*numbers), method=method, recompute_ratio=ALL.get(method))
            report = result.report
            known = ("is gone or damaged", "would take longer")
            assert all(reason.endswith(known) for reason in report.fallbacks), report.fallbacks
            counted = report.prefix + report.reused + report.recomputed + report.fresh
            assert counted == report.prompt_tokens == len(result.layout)
            assert method == "naive" or float((result.logits - full).abs().max()) < 1e-4


def test_many_threads_and_kinds_keep_the_budget() -> None:
    total, _ = needed()
    over: list[int] = []
    errors: list[BaseException] = []
    with Engine(tiny_backbone(), memory_bytes=total // 4) as engine:
        engine.ensure(PASSAGES)
        memory, done = budget(engine), threading.Event()

        def guarded(work: Callable[[], object]) -> threading.Thread:
            def run() -> None:
                try:
                    work()
                except BaseException as error:
                    errors.append(error)

            return threading.Thread(target=run)

        def watch() -> None:
            while not done.is_set():
                over.append(memory.nbytes)

        def work(number: int) -> None:
            for step in range(12):
                ask(engine, METHODS[(number + step) % len(METHODS)], step, step + number)
                engine.ensure(PASSAGES)

        watcher, workers = guarded(watch), [guarded(lambda n=n: work(n)) for n in range(3)]  # type: ignore[misc]
        for thread in [watcher, *workers]:
            thread.start()
        for thread in workers:
            thread.join()
        done.set()
        watcher.join()
        assert not errors and max(over) <= memory.cap
        assert memory.nbytes == sum(engine.stats().memory.values())


def test_forgetting_empties_the_prefix_caches() -> None:
    with Engine(tiny_backbone()) as engine:
        engine.ensure(PASSAGES)
        for method in ("prefix-cache", "ragcache", "cachecraft"):
            ask(engine, method, 0, 1)
        assert set(engine.stats().memory) >= {"prefix caches", "harvested variants"}
        engine.forget([PASSAGES[0], PASSAGES[1]])
        assert not set(engine.stats().memory) & {"prefix caches", "harvested variants"}
