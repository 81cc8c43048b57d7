"""What attention may see and how much of it goes where; and how keys move."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_backbone
from torch import Tensor

from cacheclip_rag.compute import LayerInput, visible
from cacheclip_rag.methods.scores import AttentionScores, Normalise
from cacheclip_rag.model.attention.mask import BLOCK, SparseRows, trailing
from cacheclip_rag.model.rotary import Rotary

# ---- the mask ----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 40))
def test_a_row_sees_itself_and_what_is_before_it_within_the_window(data: st.DataObject, keys: int) -> None:
    rows = sorted(data.draw(st.sets(st.integers(0, keys - 1), min_size=1)))
    window = data.draw(st.none() | st.integers(1, keys + 5))
    mask = visible(torch.tensor(rows), keys, window)
    assert mask.shape == (len(rows), keys) and mask.dtype == torch.bool
    for i, row in enumerate(rows):
        seen = {key for key in range(keys) if key <= row and (window is None or row - key < window)}
        assert set(mask[i].nonzero()[:, 0].tolist()) == seen


def test_scattered_rows_are_not_aligned_to_the_end_of_the_keys() -> None:
    assert visible(torch.tensor([0, 5]), 8).sum(dim=1).tolist() == [1, 6]  # a bottom-right triangle would say 7 and 8


def test_a_window_of_one_is_the_row_itself() -> None:
    assert torch.equal(visible(torch.arange(6), 6, 1), torch.eye(6, dtype=torch.bool))


def test_rows_of_an_ordinary_step_are_the_newest() -> None:
    assert trailing(3, 10, torch.device("cpu")).rows.tolist() == [7, 8, 9]


@pytest.mark.parametrize("window", [None, 1, 7, 100, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_block_by_block_rows_see_what_they_see_altogether(seed: int, window: int | None) -> None:
    keys = 2 * BLOCK + 150
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(keys, generator=generator)[: 2 * BLOCK + 30].sort().values
    sparse = SparseRows(rows, "cpu")
    seen = torch.zeros(len(rows), keys)
    last = 0
    for start, stop, first_slot, last_slot, _ in sparse.blocks:
        assert start == last < stop and (first_slot, last_slot) == (int(rows[start]), int(rows[stop - 1]))
        reach = slice(0 if window is None else max(0, first_slot - window + 1), last_slot + 1)
        for _ in range(2):  # the second time, it is remembered
            bias = sparse.bias(start, stop, reach, 1, window, torch.float32)
            assert set(bias.unique().tolist()) <= {0.0, -math.inf}
            seen[start:stop, reach] = (bias == 0).float()
        last = stop
    assert last == len(rows)
    assert torch.equal(seen.bool(), visible(rows, keys, window))


def test_only_all_rows_from_the_first_on_are_a_triangle() -> None:
    assert SparseRows(torch.arange(5), "cpu").dense
    for rows in ([1, 2, 3], [0, 1, 3], [4]):
        assert not SparseRows(torch.tensor(rows), "cpu").dense


# ---- the probe ---------------------------------------------------------------------------------------------------

HEADS, KV_HEADS, WIDTH, KEYS = 6, 2, 8, 30


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def by_hand(
    layers: dict[int, tuple[Tensor, Tensor]],
    rows: list[int],
    seen_rows: list[int],
    columns: list[int],
    normalise: str,
    groups: list[int],
    scaling: float,
) -> np.ndarray:
    """The mean over layers, heads and rows, one softmax at a time, in float64."""
    total, terms = np.zeros(len(columns)), 0
    for query, key in layers.values():
        q, k = query[0].double().numpy(), key[0].double().numpy()
        for head in range(HEADS):
            for row in rows:
                logits = k[head // (HEADS // KV_HEADS)] @ q[head, seen_rows.index(row)] * scaling
                if normalise == "row":
                    total += np.append(softmax(logits[: row + 1]), np.zeros(KEYS))[columns]
                elif normalise == "context":
                    total += softmax(logits[columns])
                else:
                    for group in set(groups):
                        members = [i for i, g in enumerate(groups) if g == group]
                        total[members] += softmax(logits[[columns[i] for i in members]])
                terms += 1
    return total / terms


def layer(seed: int, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, HEADS, rows, WIDTH, generator=generator)
    return 3 * query.to(dtype), torch.randn(1, KV_HEADS, KEYS, WIDTH, generator=generator).to(dtype)


SEEN = [2, 3, 9, 17, 20, 24, 25, 26, 27]  # the rows of the forward
ROWS = [24, 25, 27]  # the question's, among them
COLUMNS = [3, 4, 5, 6, 10, 11, 12, 19, 20, 21]
GROUPS = [1, 1, 1, 1, 0, 0, 0, 2, 2, 2]


class Workspace:
    """Keys as they are placed; what the forward computes is not there yet, whatever memory holds."""

    def __init__(self, key: Tensor, rows: Tensor) -> None:
        self.keys = key[0].transpose(0, 1).clone()
        self.keys[rows] = math.nan

    def placed(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys, self.keys


def shown(number: int, query: Tensor, key: Tensor, scaling: float) -> LayerInput:
    """What a hook is shown of one layer of the forward over `SEEN`."""
    rows = torch.tensor(SEEN)
    new, workspace = key[0, :, rows].transpose(0, 1), Workspace(key, rows)
    return LayerInput(number, rows, query[0].transpose(0, 1), new, new, scaling, workspace)  # type: ignore[arg-type]


def probe(normalise: Normalise, layers: list[int]) -> AttentionScores:
    return AttentionScores(torch.tensor(ROWS), torch.tensor(COLUMNS), layers, normalise, torch.tensor(GROUPS))


@pytest.mark.parametrize("normalise", get_args(Normalise))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_the_mean_attention(normalise: Normalise, dtype: torch.dtype) -> None:
    layers = {number: layer(number, len(SEEN), dtype) for number in (1, 4, 5)}
    scaling = 0.3
    looking = probe(normalise, list(layers))
    for number, (query, key) in layers.items():
        looking(shown(number, query, key, scaling))
    expected = by_hand(layers, ROWS, SEEN, COLUMNS, normalise, GROUPS, scaling)
    assert looking.scores.shape == (len(COLUMNS),) and looking.scores.dtype == torch.float32
    np.testing.assert_allclose(looking.scores.numpy(), expected, rtol=1e-4, atol=1e-7)


def test_what_each_normalisation_sums_up_to() -> None:
    query, key = layer(0, len(SEEN))
    scores = {}
    for normalise in get_args(Normalise):
        looking = probe(normalise, [0])
        looking(shown(0, query, key, 0.3))
        scores[normalise] = looking.scores
    assert 0 < float(scores["row"].sum()) < 1  # the rest goes to keys that are no columns
    assert math.isclose(float(scores["context"].sum()), 1, rel_tol=1e-5)
    for group in range(3):
        mine = scores["chunk"][torch.tensor(GROUPS) == group]
        assert math.isclose(float(mine.sum()), 1, rel_tol=1e-5)


def test_a_row_gives_nothing_to_what_comes_after_it() -> None:
    looking = AttentionScores(torch.tensor([9, 17]), torch.tensor([8, 9, 15, 17, 18, 29]), [0], "row")
    query, key = layer(0, len(SEEN))
    looking(shown(0, query, key, 0.3))
    scores = looking.scores
    assert (scores[:4] > 0).all() and (scores[4:] == 0).all()


def test_overwhelming_attention_overflows_nothing() -> None:
    query, key = layer(0, len(SEEN))
    for normalise in get_args(Normalise):
        looking = probe(normalise, [0])
        looking(shown(0, query * 1000, key * 1000, 1.0))
        assert looking.scores.isfinite().all() and float(looking.scores.sum()) > 0


def test_before_any_layer_the_scores_are_zero() -> None:
    looking = probe("row", [3])
    assert looking.scores.tolist() == [0.0] * len(COLUMNS)
    assert looking.layers == frozenset({3})


def test_chunks_cannot_be_told_apart_without_numbers() -> None:
    with pytest.raises(ValueError, match="groups"):
        AttentionScores(torch.tensor(ROWS), torch.tensor(COLUMNS), [0], "chunk")


def test_however_many_rows_ask_scores_are_made_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = layer(0, len(SEEN))
    whole, parts = probe("row", [0]), probe("row", [0])
    whole(shown(0, query, key, 0.3))
    monkeypatch.setattr("cacheclip_rag.methods.scores.BLOCK", HEADS * KEYS)  # a row at a time
    parts(shown(0, query, key, 0.3))
    assert torch.allclose(whole.scores, parts.scores, atol=1e-7)


def test_a_sliding_window_hides_what_the_model_does_not_see() -> None:
    query, key = layer(0, len(SEEN))
    looking = AttentionScores(torch.tensor(ROWS), torch.tensor(COLUMNS), [0], windows=[6])
    looking(shown(0, query, key, 0.3))
    assert (looking.scores[:7] == 0).all() and (looking.scores[7:] > 0).all()  # 24 sees 19 and later, 27 from 22 on


@pytest.mark.parametrize("normalise", get_args(Normalise))
def test_looking_changes_nothing(normalise: Normalise) -> None:
    query, key = layer(0, len(SEEN))
    before = query.clone(), key.clone()
    looking = probe(normalise, [0])
    looking(shown(0, query, key, 0.3))
    assert torch.equal(query, before[0]) and torch.equal(key, before[1])


def test_only_the_layers_asked_for_are_looked_at() -> None:
    """A forward of a model shows each hook its own layers."""
    backbone = tiny_backbone("llama")
    rows = torch.arange(12)
    looking, noted = AttentionScores(rows[-2:], rows[:6], [1, 3]), []

    class Note:
        layers = None

        def __call__(self, at: LayerInput) -> None:
            noted.append(at.layer)

    backbone.forward(rows, rows, backbone.canvas(12), hooks=[looking, Note()])
    assert noted == [0, 1, 2, 3]
    alone = [AttentionScores(rows[-2:], rows[:6], [number]) for number in (1, 3)]
    backbone.forward(rows, rows, backbone.canvas(12), hooks=alone)
    assert torch.allclose(looking.scores, (alone[0].scores + alone[1].scores) / 2, atol=1e-7)


# ---- moving keys -------------------------------------------------------------------------------------------------

FREQUENCIES = 10_000.0 ** -(torch.arange(0, 16, 2) / 16)


def turned(x: Tensor, position: int, frequencies: Tensor) -> Tensor:
    """RoPE by complex numbers: dimension i and i + d/2 are one, turned by its frequency times the position."""
    half = frequencies.shape[-1]
    rotated = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    rotated = rotated * torch.polar(torch.ones(half, dtype=torch.float64), position * frequencies.double())
    return torch.cat([rotated.real, rotated.imag, x[..., 2 * half :].double()], dim=-1)


@pytest.mark.parametrize("start,delta", [(0, 1), (7, 1234), (5000, -4321), (100, 30_000), (0, 1_000_000)])
def test_a_moved_key_is_the_key_at_the_other_place(start: int, delta: int) -> None:
    raw = torch.randn(2, 3, 4, 16)
    rotary = Rotary(FREQUENCIES.expand(2, -1))
    moved = rotary.rotate(turned(raw, start, FREQUENCIES).float(), delta)
    torch.testing.assert_close(moved.double(), turned(raw, start + delta, FREQUENCIES), rtol=0, atol=2e-6)


def test_every_layer_turns_by_its_own_frequencies() -> None:
    raw, other = torch.randn(2, 1, 3, 16), FREQUENCIES * 0.01
    moved = Rotary(torch.stack([FREQUENCIES, other])).rotate(raw, 50)
    torch.testing.assert_close(moved[0].double(), turned(raw[0], 50, FREQUENCIES), rtol=0, atol=2e-6)
    torch.testing.assert_close(moved[1].double(), turned(raw[1], 50, other), rtol=0, atol=2e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(-5000, 5000), st.integers(-5000, 5000))
def test_moves_add_up_and_can_be_taken_back(a: int, b: int) -> None:
    rotary, keys = Rotary(FREQUENCIES[None]), torch.randn(1, 2, 3, 16)
    torch.testing.assert_close(rotary.rotate(rotary.rotate(keys, a), b), rotary.rotate(keys, a + b), rtol=0, atol=5e-6)
    torch.testing.assert_close(rotary.rotate(rotary.rotate(keys, a), -a), keys, rtol=0, atol=5e-6)
    torch.testing.assert_close(rotary.rotate(keys, a).norm(dim=-1), keys.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_move_by_nothing_copies_bit_for_bit(dtype: torch.dtype) -> None:
    keys = torch.randn(1, 2, 3, 16).to(dtype)
    keys[0, 0, 0, 0] = float("nan")
    rotary = Rotary(FREQUENCIES[None])
    same = rotary.rotate(keys, 0)
    assert torch.equal(same.view(torch.uint8), keys.view(torch.uint8)) and same.data_ptr() != keys.data_ptr()


def test_dimensions_that_are_not_rotated_stay() -> None:
    keys = torch.randn(1, 2, 3, 24)
    moved = Rotary(FREQUENCIES[None]).rotate(keys, 77)
    assert torch.equal(moved[..., 16:], keys[..., 16:]) and not torch.equal(moved[..., :16], keys[..., :16])


def test_bfloat16_keys_are_turned_in_float32_and_rounded_once() -> None:
    keys = torch.randn(1, 2, 3, 16).bfloat16()
    moved = Rotary(FREQUENCIES[None]).rotate(keys, 4321)
    assert moved.dtype == torch.bfloat16
    exact = turned(keys.float(), 4321, FREQUENCIES)
    assert ((moved.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all()


def test_keys_can_be_moved_into_place() -> None:
    keys, canvas = torch.randn(1, 2, 3, 16), torch.zeros(1, 2, 10, 16)
    rotary = Rotary(FREQUENCIES[None])
    for delta in (0, 12):
        before = keys.clone()
        rotary.rotate(keys, delta, out=canvas[:, :, 4:7])
        assert torch.equal(canvas[:, :, 4:7], rotary.rotate(keys, delta))
        assert (canvas[:, :, :4] == 0).all() and (canvas[:, :, 7:] == 0).all() and torch.equal(keys, before)
