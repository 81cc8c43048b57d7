"""What the analyses measure, on tiny models where the right values are known."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cacheclip_eval import Item, Passage, plots
from cacheclip_eval.analyses import agreement, deviation, shared_part
from cacheclip_eval.hits import ANYWHERE, hits
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import Engine
from cacheclip_rag.errors import ConfigurationError

ITEM = Item("1", "Who built the lighthouse?", ("Ada",), tuple(Passage("", text) for text in PASSAGES))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_backbone("qwen2"), auxiliary=tiny_backbone("llama"), method="naive")


def test_agreement_is_measured_against_the_primary_s_last_layer(engine: Engine) -> None:
    rows = list(agreement(engine, [ITEM], {"helper": engine.auxiliary}))
    by_model = defaultdict(list)
    for row in rows:
        by_model[row["model"]].append(row)
    assert [row["layer"] for row in by_model["primary"]] == [0, 1, 2, 3] == [r["layer"] for r in by_model["helper"]]
    last = by_model["primary"][-1]
    assert last["jaccard"] == 1.0 and last["kl"] == pytest.approx(0.0, abs=1e-9) and last["depth"] == 1.0
    assert all(0.0 <= row["jaccard"] < 1.0 and row["kl"] > 0.0 for row in rows if row is not last)


def test_reused_keys_are_right_in_layer_0_and_behind_their_own_prefix_and_wrong_elsewhere(engine: Engine) -> None:
    rows = list(deviation(engine, [ITEM], bins=4))
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["mean"] == pytest.approx(0.0, abs=1e-3), "layer 0's keys depend on no context"
    assert all(row["mean"] > 1e-2 and len(row["by_place"]) == 4 for row in rows[1:])
    for layer, row in enumerate(rows):
        assert row["overlap"][layer] == 1.0 and all(0.0 <= share <= 1.0 for share in row["overlap"])
    assert rows[1]["overlap"][2] == rows[2]["overlap"][1]
    assert rows[0]["shared_keys"] is None and rows[0]["shared_values"] is None
    assert all(0.0 < row[f"shared_{kind}"] < 1.0 for row in rows[1:] for kind in ("keys", "values"))


def test_what_a_chunk_shares_of_its_deviation_is_its_mean_s_share() -> None:
    groups = torch.tensor([0, 0, 3])
    same = torch.tensor([[[1.0, 2.0]], [[1.0, 2.0]], [[5.0, 0.0]]])
    assert shared_part(same, groups) == pytest.approx(1.0)
    opposed = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]], [[0.0, 1.0]]])
    assert shared_part(opposed, groups) == pytest.approx(1 / 3)  # only the chunk of one token has a mean


def test_exact_reuse_hits_what_stood_in_the_same_place_before(engine: Engine) -> None:
    turned = replace(ITEM, id="2", passages=ITEM.passages[::-1])
    rows = list(hits(engine.backbone, [ITEM, ITEM, turned]))
    found = {(row["id"], row["method"], n): row for n, row in enumerate(rows)}
    prefix = [row["found"] for row in found.values() if row["method"] == "prefix-cache"]
    tree = [row["found"] for row in found.values() if row["method"] == "ragcache"]
    tokens = rows[0]["prompt_tokens"]
    assert prefix[0] == tree[0] == 0
    assert prefix[1] == (tokens - 1) // 16 * 16, "every whole block but the last token's"
    context = sum(len(text) for text in PASSAGES)
    assert context < tree[1] < tokens, "head and documents, not the question"
    head = rows[0]["prompt_tokens"] - context
    assert 0 < prefix[2] <= head and 0 < tree[2] <= head, "another first document ends the common beginning"
    half = replace(ITEM, id="3", passages=ITEM.passages[:2])
    anywhere = [row["found"] for row in hits(engine.backbone, [half, turned, ITEM]) if row["method"] == ANYWHERE]
    assert anywhere == [0, sum(len(text) for text in PASSAGES[:2]), context]  # a token a character
    with pytest.raises(ConfigurationError, match="no prefix caching"):
        list(hits(engine.backbone, [ITEM], ["naive"]))


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    points = [(0.2, 0.3), (0.3, 0.1), (0.3, 0.2), (0.1, 0.5), (0.4, 0.1)]
    assert plots.front_of(points) == [True, True, False, True, False]
    assert plots.front_of(points, lower=False) == [False, False, False, True, False]


def test_a_line_of_lengths_counts_every_row_once() -> None:
    few = [{"system": "a", "chunks": n, "kl": kl} for n, kl in [(2, 0.1), (2, 0.3), (5, 0.4), (10, 0.5)]]
    assert plots.quarters(few, "chunks", "kl") == {"a": [(2, pytest.approx(0.2)), (5, 0.4), (10, 0.5)]}
    many = [{"system": "a", "chunks": n, "kl": float(n)} for n in range(1, 9)]
    assert plots.quarters(many, "chunks", "kl") == {"a": [(1.5, 1.5), (3.5, 3.5), (5.5, 5.5), (7.5, 7.5)]}
    many += [{"system": "b", "chunks": 8, "kl": 0.0}]
    assert plots.quarters(many, "chunks", "kl")["b"] == [(8, 0.0)]


def test_figures_are_drawn(engine: Engine, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plots.agreement(agreement(engine, [ITEM], {"helper": engine.auxiliary}), tmp_path / "agreement.svg")
    plots.deviation(deviation(engine, [ITEM]), tmp_path / "deviation.svg")
    records = [
        {"dataset": "d", "system": f"cacheclip@{r}:group_size=8", "ttft": r, "kl": 1 - r, "prompt_tokens": int(99 * r)}
        for r in (0.1, 0.2, 0.3)
    ]
    plots.pareto(records, tmp_path / "pareto.svg")
    plots.pareto(records, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "pareto.svg").read_bytes()  # no churn in what is kept
    plots.sweep(records, tmp_path / "ratio.svg", "ratio")
    plots.sweep(records, tmp_path / "window.svg", "group_size")
    plots.length(records, tmp_path / "length.svg")
    for file in tmp_path.iterdir():
        assert "</svg>" in file.read_text()
    with pytest.raises(ConfigurationError, match="prefix"):
        plots.sweep(records, tmp_path / "none.svg", "prefix")


def test_a_sweep_has_a_line_for_each_system() -> None:
    swept = plots.parameter_of
    assert swept("cacheclip@0.1:layers=upper,group_size=4", "group_size") == ("cacheclip@0.1:layers=upper", 4.0)
    assert swept("cacheclip@0.1:layers=last,group_size=4", "group_size") == ("cacheclip@0.1:layers=last", 4.0)
    assert swept("query_guided@0.1:layers=(0.69, 0.83),group_size=1", "group_size") == (
        "query_guided@0.1:layers=(0.69, 0.83)",
        1.0,
    )
    assert swept("cacheclip@0.05+int8", "ratio") == ("cacheclip+int8", 0.05)
    assert swept("cacheclip@0.05:group_size=4+int8", "ratio") == ("cacheclip:group_size=4+int8", 0.05)
    assert swept("cacheclip:prefix=none", "prefix") == ("cacheclip", "none")
    assert swept("naive:prefix='a+b',group_size=4+int8", "group_size") == ("naive:prefix='a+b'+int8", 4.0)


def test_items_that_nothing_can_be_said_about_are_left_out(engine: Engine) -> None:
    short = replace(ITEM, id="short", passages=tuple(replace(p, text="no chunk", title="") for p in ITEM.passages))
    mute = replace(ITEM, id="mute", question=" ")
    rows = list(agreement(engine, [short, mute, ITEM], {}))
    assert {row["id"] for row in rows} == {ITEM.id}
    assert {row["id"] for row in deviation(engine, [short, ITEM])} == {ITEM.id}
