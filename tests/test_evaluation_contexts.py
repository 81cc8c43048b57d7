"""An evaluation of fused chunks: with whom they are fused, and what a system's rows say of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from cacheclip_eval import Item, Passage, access, run
from cacheclip_eval.contexts import planner
from cacheclip_eval.systems import parse
from fused import A, B, C, D, E
from tiny import tiny_backbone

from cacheclip_rag import ConfigurationError, Engine


def item(name: str, *texts: str) -> Item:
    return Item(name, "Who?", ("x",), tuple(Passage("", text) for text in texts))


def test_company_from_use_is_what_other_items_retrieved_together() -> None:
    corpus = [item("1", A, B, C), item("2", B, A, D), item("3", B, A), item("4", C, E)]
    plan = planner("use", 10, corpus, [], lambda texts: 1 / 0)
    found = plan(corpus[0]).neighbours
    assert found[A] == [B, D] and found[B] == [
        A,
        D,
    ]  # twice with each other, once with D; their own item is not counted
    assert found[C] == [E]
    assert plan(item("5", A, B)).neighbours[A][:1] == [B]
    alone = planner("use", 2, [item("1", A, B, C, D)], [], lambda texts: 1 / 0)
    assert alone(item("1", A, B, C, D)).neighbours == {
        A: [C, D],
        B: [C, D],
        C: [D, A],
        D: [C, A],
    }  # as asked before, turned round


def test_company_from_prompts_are_the_items_most_like_this_one() -> None:
    corpus = [item("1", A, B, C), item("2", B, A, D), item("3", B, A, C), item("4", C, E), item("5", D, E)]
    met = planner("prompts", 10, corpus, [], lambda texts: 1 / 0)
    assert met(corpus[0]).sequences == [[B, A, C], [B, A, D], [C, E]] and met(corpus[0]).neighbours == {}
    assert met(item("6", A, "new")).sequences[-1] == ["new", A]  # nobody else asked about "new"
    assert met(corpus[1]).sequences[0] in ([A, B, C], [B, A, C])


def test_company_by_resemblance_is_sought_in_the_whole_corpus() -> None:
    place = {A: 0.0, B: 0.1, C: 1.0, D: 0.9, E: 0.5}
    embed = lambda texts: [[np.cos(place[t]), np.sin(place[t])] for t in texts]  # noqa: E731
    plan = planner("similar", 2, [item("1", A, C), item("2", B)], [D, E], embed)
    assert plan(item("1", A, C)).neighbours == {A: [B, E], C: [D, E]}
    with pytest.raises(ConfigurationError, match="similar, use, prompts"):
        planner("rumour", 2, [], [], embed)


def test_systems_with_different_company_share_a_store_and_not_their_variants(tmp_path: Path) -> None:
    ready, items = Engine(tiny_backbone()), [item("1", A, B, C), item("2", C, A, E)]
    systems = parse(["naive:context=use", "naive:context=use,neighbours=1", "naive:context=prompts", "naive"])
    systems = [
        dataclasses.replace(s, plan=planner(s.context, s.neighbours, items, [], lambda texts: 1 / 0))
        if s.context
        else s
        for s in systems
    ]
    assert run(ready, items[:1], systems, tmp_path / "rows.jsonl", dataset="set", max_new_tokens=2) == 0
    kl = {row["system"]: row["kl"] for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert len(set(kl.values())) == 5
    # Alone in a store, each gives the same.
    assert (
        run(Engine(tiny_backbone()), items[:1], systems[1:2], tmp_path / "one.jsonl", dataset="set", max_new_tokens=2)
        == 0
    )
    (_, row) = map(json.loads, (tmp_path / "one.jsonl").read_text().splitlines())
    assert row["kl"] == kl["naive:context=use,neighbours=1"]


def test_the_bytes_of_a_system_that_fuses_are_those_of_chunks_and_variants(tmp_path: Path) -> None:
    """With "use", one variant of each chunk; of C, A and E and of B, C and A fused as prompts, all but the first."""
    items = [item("1", A, B, C), item("2", C, A, E)]
    for context, variants_of in {"use": [A, B, C], "prompts": [A, C, A]}.items():
        ready, path = Engine(tiny_backbone()), tmp_path / f"{context}.jsonl"
        fusing = dataclasses.replace(
            parse([f"naive:context={context}"])[0], plan=planner(context, 9, items, [], lambda texts: 1 / 0)
        )
        assert run(ready, items[:1], [*parse(["naive"]), fusing], path, dataset="set", max_new_tokens=2) == 0
        _, plain, row = map(json.loads, path.read_text().splitlines())
        size = {text: ready.library.get(ready.library.key(text)).nbytes for text in (A, B, C)}
        assert plain["stored_bytes"] == sum(size.values())
        assert row["stored_bytes"] == plain["stored_bytes"] + sum(size[text] for text in variants_of)
        assert row["stored_tokens"] == plain["stored_tokens"] == len(A) + len(B) + len(C)


@pytest.mark.parametrize("spec", ["naive:context=rumour", "naive:context=use,neighbours=0", "cachecraft:context=use"])
def test_systems_that_cannot_be_fused_are_refused(spec: str) -> None:
    with pytest.raises(ConfigurationError):
        parse([spec])


def test_a_company_that_does_not_fit_is_no_row_of_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be reused by itself, or behind fewer, and the row would say otherwise."""
    ready = Engine(tiny_backbone(), method="naive")
    monkeypatch.setattr(ready.backbone, "context_length", 2 * len(A) + len(ready.library.prefix_ids))
    [system] = parse(["naive:context=use"])
    plan = planner("use", 9, [item("1", A, B, C)], [], None)
    with pytest.raises(ConfigurationError, match="fewer neighbours"):
        access.fuse(ready, system.recipe, plan(item("1", A, B, C)))
    with pytest.raises(ConfigurationError, match="plan"):
        run(ready, [item("1", A, B)], [system], tmp_path / "x.jsonl", dataset="set", max_new_tokens=2)
