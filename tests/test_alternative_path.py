"""Alternative Path against a prefix tree: what each finds and keeps, over one workload."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from cacheclip_rag import ConfigurationError

_spec = spec_from_file_location("paths", Path(__file__).parent.parent / "benchmarks" / "paths.py")
assert _spec is not None and _spec.loader is not None
paths = module_from_spec(_spec)
sys.modules["paths"] = paths  # where its dataclasses look themselves up
_spec.loader.exec_module(paths)


def test_the_paper_s_example() -> None:
    """S+b, then S+a+b: b is found behind S; then S+b+a: a is found where the second question left it."""

    class Three(paths.Workload):
        def __iter__(self) -> Any:
            return iter([["b"], ["a", "b"], ["b", "a"]])

    prefix, ours = paths.simulate(Three(base=1))
    assert (prefix.hit, prefix.stored, prefix.again) == (1, 1 + 4, 2)  # only S+b comes again
    assert (ours.hit, ours.stored, ours.again) == (3, 1 + 2, 0)


def test_one_copy_a_chunk_whatever_the_workload() -> None:
    workload = paths.Workload(queries=50, chunks_each=5, base=40, pool=20, seed=3)
    queries = list(workload)
    assert queries == list(workload) and all(len(set(q)) == 5 for q in queries) and len(queries) == 50
    prefix, ours = paths.simulate(workload)
    asked = [chunk for query in queries for chunk in query]
    assert ours.stored == len({*asked, *(f"base {n}" for n in range(40))}) < prefix.stored and ours.again == 0
    assert prefix.asked == ours.asked == 250 and ours.hit == 250 - (ours.stored - 40) > prefix.hit
    share = sum(chunk.startswith("base") for chunk in asked) / len(asked)
    assert 0.4 < share < 0.7
    with pytest.raises(ConfigurationError):
        paths.Workload(known=0.9, shared=0.2)
