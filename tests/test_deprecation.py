"""Names that users may have typed keep working for one release, and warn with the new name."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import ChunkKV, ChunkUse, Engine, Method, Report
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.kv.encode import Harvested
from cacheclip_rag.kv.prefix_caching import DocumentTree, PrefixBlocks
from cacheclip_rag.methods import resolve
from cacheclip_rag.methods.select.cacheclip import CacheClip
from cacheclip_rag.methods.select.everything import Everything
from cacheclip_rag.methods.select.query_guided import QueryGuided
from cacheclip_rag.report import TokenSource, TokenSources

MOVED = [
    ("cacheclip_rag.backbone", "Backbone", "cacheclip_rag.model.backbone", "Backbone"),
    ("cacheclip_rag.backbone", "best_dtype", "cacheclip_rag.model.backbone", "best_dtype"),
    ("cacheclip_rag.pull", "resolve", "cacheclip_rag.weights.pull", "resolve"),
    ("cacheclip_rag.prompt", "WINDOW", "cacheclip_rag.prompt", "ANCHOR_LENGTH"),
    ("cacheclip_rag.report", "Fate", "cacheclip_rag.report", "TokenSource"),
    ("cacheclip_rag.report", "Fates", "cacheclip_rag.report", "TokenSources"),
    ("cacheclip_rag.methods", "behind", "cacheclip_rag.methods", "with_prefix"),
]


@pytest.mark.parametrize(("module", "name", "home", "new"), MOVED)
def test_a_moved_name_is_the_new_one_and_warns(module: str, name: str, home: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=new):
        assert getattr(importlib.import_module(module), name) is getattr(importlib.import_module(home), new)


def test_modules_that_users_import_are_there_and_have_no_other_names() -> None:
    for name in ("backbone", "prompt", "pull", "store", "methods", "report", "errors", "chunks"):
        module = importlib.import_module(f"cacheclip_rag.{name}")
        with pytest.raises(AttributeError):
            module.nothing_of_the_kind  # noqa: B018


def chunk() -> ChunkKV:
    ids = torch.zeros(1, dtype=torch.long)
    kv = torch.zeros(1, 1, 1, 2)
    return ChunkKV("text", ids, torch.zeros(1, 2, dtype=torch.long), kv, kv, 0, context=("a",), in_sequence=True)


def sources() -> TokenSources:
    return TokenSources.of("ab", np.array([0, 1]), np.array([0, 2]))


def use(**given: Any) -> ChunkUse:
    return ChunkUse("key", 0, 1, 1, 0, 0, True, **given)


RENAMED: list[tuple[Any, str, Any]] = [
    (chunk, "company", ("a",)),
    (chunk, "joint", True),
    (lambda: use(in_place=True), "exact", True),
    (lambda: Report("auto", 0.1, token_sources=sources()), "fates", sources()),
    (lambda: next(sources().runs()), "fate", TokenSource.FRESH),
    (lambda: resolve("prefix-cache"), "exact", resolve("prefix-cache").prefix_cache),
    (lambda: tiny_backbone(), "window", 4096),
]


@pytest.mark.parametrize(("make", "old", "value"), RENAMED, ids=[old for _, old, _ in RENAMED])
def test_a_renamed_attribute_has_the_new_one_s_value_and_warns(make: Any, old: str, value: Any) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is now"):
        found = getattr(make(), old)
    assert repr(found) == repr(value)


def test_former_parameters_are_taken_and_warned_of() -> None:
    with pytest.warns(DeprecationWarning, match="group_size"):
        assert CacheClip(window=16) == CacheClip(group_size=16)  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="group_size"):
        assert QueryGuided(window=1) == QueryGuided(group_size=1)  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="group_size"):
        assert resolve("cacheclip:window=16") == resolve("cacheclip", group_size=16)
    with pytest.warns(DeprecationWarning, match="in_place"):
        assert use(exact=True) == use(in_place=True)
    caching = resolve("prefix-cache").prefix_cache
    with pytest.warns(DeprecationWarning, match="prefix_cache"):
        mine = Method("mine", Everything(), exact=caching)  # type: ignore[call-arg]
    assert mine.prefix_cache == caching and mine.strategy == "prefix"


def test_parameters_that_are_gone_are_ignored_and_warned_of() -> None:
    with pytest.warns(DeprecationWarning, match="memory_bytes"):
        assert PrefixBlocks(block=8, capacity_bytes=10) == PrefixBlocks(block=8)  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="memory_bytes"):
        assert DocumentTree(capacity_bytes=10) == DocumentTree()  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="memory_bytes"):
        assert Harvested(chunks=10) == Harvested()  # type: ignore[call-arg]
    for old in ("prefix-cache:capacity_bytes=10", "ragcache:capacity_bytes=10", "cachecraft:chunks=10"):
        with pytest.warns(DeprecationWarning, match="memory_bytes"):
            assert resolve(old) == resolve(old.partition(":")[0])
    with pytest.raises(ConfigurationError, match="capacity_bytes"):
        resolve("naive:capacity_bytes=10")


def test_former_methods_of_the_engine_answer_as_the_new_ones() -> None:
    engine = Engine(tiny_backbone(), method="prefix-cache")
    with pytest.warns(DeprecationWarning, match=r"Engine\.contexts"):
        assert engine.company() == engine.contexts()
    with pytest.warns(DeprecationWarning, match="prefix_cache_of"):
        assert engine.exact_of("prefix-cache") is engine.prefix_cache_of("prefix-cache")


def test_nothing_of_our_own_uses_a_former_name(recwarn: pytest.WarningsRecorder) -> None:
    with Engine(tiny_backbone(), method="auto") as engine:
        engine.ensure(PASSAGES)
        engine.fuse({PASSAGES[1]: [PASSAGES[0]]})
        report = engine.generate("\n\n".join(PASSAGES) + "\n\nWho?", max_new_tokens=2).report
        report._repr_html_(), str(report), engine.stats().as_dict(), engine.forget(PASSAGES[:1])
    assert [str(w.message) for w in recwarn if " is now " in str(w.message)] == []
