"""What recomputing changed is carried over to the rest of a chunk: by how much, to which rows, and when not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import distance, watch
from tiny import PASSAGES, tiny_backbone
from torch import Tensor

from cacheclip_rag import Backbone, ConfigurationError, Engine
from cacheclip_rag.methods import Method, resolve
from cacheclip_rag.methods.recompute.carry import Carry

A, B, C = PASSAGES[:3]
TEXT = f"<|im_start|>Read:\n{A}\n\n{B}\n\n{C}\n\nWho built it, and when was that?<|im_end|>\n"
KINDS = ["llama", "yarn-rope", "mistral-sliding", "gemma3"]


def known(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Engine:
    engine = Engine(tiny_backbone(kind, dtype), method="auto")
    assert engine.ensure([A, B, C]).skipped == []
    return engine


def recipe(select: str = "random", **parameters: object) -> Method:
    return resolve(replace(resolve("auto"), select=resolve(select).select), **parameters)


def turned(keys: Tensor, positions: Tensor, engine: Engine, layer: int) -> Tensor:
    """Keys ``[Hk, n, D]`` rotated to other positions, with complex numbers."""
    frequencies = engine.backbone.rotary.inverse_frequencies
    frequencies = frequencies[layer if len(frequencies) > 1 else 0].double()
    a, b = keys.double().chunk(2, dim=-1)
    moved = torch.complex(a, b) * torch.polar(torch.ones(()).double(), positions[:, None] * frequencies)
    return torch.cat([moved.real, moved.imag], dim=-1)


def shortened(changes: Tensor, most: float) -> Tensor:
    """None of ``[Hk, k, D]`` longer than ``most`` times the median of its head."""
    bounded = changes.clone()
    for head in bounded:
        median = head.norm(dim=-1).sort().values[(len(head) - 1) // 2]
        for token in head:
            token *= min(1.0, float(most * median / token.norm()))
    return bounded


@pytest.mark.parametrize(("carry", "weight"), [(0.5, 4.0), (1e9, 0.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_a_chunk_moves_by_the_mean_change_of_its_recomputed_tokens(
    kind: str, carry: float, weight: float
) -> None:
    """With 1e9 nothing is shortened: it is the plain mean."""
    engine = known(kind)
    result, request, seen = watch(engine, recipe(carry=carry, weight=weight), TEXT, recompute_ratio=0.2)
    assert result.canvas is not None
    after, before = result.canvas.read(slice(len(request.layout))), seen["stored"]
    chosen, chunk = seen["chosen"], request.layout.chunk
    for layer in range(1, engine.backbone.layers):
        keys, values = ((now - was)[layer] for now, was in zip(after, before, strict=True))
        back = shortened(turned(keys[:, chosen], -chosen, engine, layer), carry)
        plain = shortened(values[:, chosen].double(), carry)
        for number in range(3):
            rest = request.rows[(chunk[request.rows] == number) & ~torch.isin(request.rows, chosen)]
            mine = chunk[chosen] == number
            assert len(rest) and mine.any()
            key, value = (
                ((change[:, mine].sum(1) + weight * change.mean(1)) / (mine.sum() + weight))[:, None].expand(
                    -1, len(rest), -1
                )
                for change in (back, plain)
            )
            torch.testing.assert_close(keys[:, rest].double(), turned(key, rest, engine, layer), atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(values[:, rest].double(), value, atol=1e-4, rtol=1e-3)
    # Layer 0 depends on no context, so nothing changes there but by rounding.
    assert distance(after[0][0][:, request.rows], before[0][0][:, request.rows]) < 1e-5


def test_what_is_computed_or_exact_is_not_moved() -> None:
    """The question and the preamble are computed; the first chunk is in place, right behind its encode prefix."""
    engine = known()
    text = engine.backbone.chat([{"role": "user", "content": f"{A}\n\n{B}\n\nWho built it?"}])
    result, request, seen = watch(engine, recipe(), text, recompute_ratio=0.3)
    assert set(request.layout.chunk[request.rows].tolist()) == {1} and result.canvas is not None
    after, exact = result.canvas.read(slice(len(request.layout))), request.layout.chunk == 0
    assert all(torch.equal(now[:, :, exact], was[:, :, exact]) for now, was in zip(after, seen["stored"], strict=True))
    plain, _, others = watch(engine, recipe(carry=0), text, recompute_ratio=0.3)
    assert plain.canvas is not None and torch.equal(others["chosen"], seen["chosen"])
    first = request.fresh[request.fresh < int(request.rows[0])]
    for now, was in zip(after, plain.canvas.read(slice(len(request.layout))), strict=True):
        assert torch.equal(now[:, :, first], was[:, :, first]), "what stands in front of all that is moved"
        assert not torch.equal(now[:, :, request.rows], was[:, :, request.rows])


def test_nothing_is_carried_to_or_from_a_fused_chunk() -> None:
    engine = known()
    engine.fuse({B: [A]})
    carried, request, seen = watch(engine, recipe(), TEXT, recompute_ratio=0.3)
    chosen, chunk, context = seen["chosen"], request.layout.chunk, [c.context for c in request.chunks if c is not None]
    assert context == [(), (A,), ()] and all((chunk[chosen] == number).any() for number in range(3))
    assert carried.canvas is not None
    after = carried.canvas.read(slice(len(request.layout)))
    rest = request.rows[~torch.isin(request.rows, chosen)]
    fused = rest[chunk[rest] == 1]
    assert all(torch.equal(now[:, :, fused], was[:, :, fused]) for now, was in zip(after, seen["stored"], strict=True))
    # The others get what they would if nobody had recomputed anything of it: layer 1's changes are those of layer 0.
    among = chosen[chunk[chosen] != 1]
    change = (after[1] - seen["stored"][1])[1]
    told = shortened(change[:, among].double(), 0.5)
    for number in (0, 2):
        mine = chunk[among] == number
        want = (told[:, mine].sum(1) + 4 * told.mean(1)) / (mine.sum() + 4)
        rows = rest[chunk[rest] == number]
        torch.testing.assert_close(
            change[:, rows].double(), want[:, None].expand(-1, len(rows), -1), atol=1e-4, rtol=1e-3
        )


def test_where_all_chunks_behind_the_first_are_fused_nothing_is_carried() -> None:
    engine = known()
    engine.fuse({B: [A], C: [A, B]})
    fused = [engine.prefill(TEXT, method=recipe(carry=carry), recompute_ratio=0.2) for carry in (0, 0.5)]
    assert torch.equal(fused[0].logits, fused[1].logits)
    alone = [engine.prefill(TEXT, method=recipe(carry=carry, fused=False), recompute_ratio=0.2) for carry in (0, 0.5)]
    assert not torch.equal(alone[0].logits, alone[1].logits)


def test_without_recomputed_tokens_nothing_is_known_to_carry() -> None:
    engine = known()
    for ratio in (0.0, 1 - 1e-13):  # none, and all
        one, other = (
            engine.prefill(TEXT, method=recipe(carry=carry), recompute_ratio=ratio).logits for carry in (0, 0.5)
        )
        assert torch.equal(one, other)


def test_what_was_carried_is_there_for_decoding_and_goes_with_the_request() -> None:
    engine = known()
    stored = [chunk.keys.clone() for text in (A, B, C) if (chunk := engine.library.get(engine.library.key(text)))]
    result = engine.prefill(TEXT, method=recipe(), recompute_ratio=0.2)
    assert result.canvas is not None
    kept = [kv.clone() for kv in result.canvas.read(slice(len(result.layout)))]
    for place in range(3):  # a token that is decoded changes nothing but its own row
        result.step(torch.tensor([65]), len(result.layout) + place)
    assert all(torch.equal(a, b) for a, b in zip(kept, result.canvas.read(slice(len(result.layout))), strict=True))
    again = [chunk.keys for text in (A, B, C) if (chunk := engine.library.get(engine.library.key(text)))]
    assert all(torch.equal(a, b) for a, b in zip(stored, again, strict=True)) and len(again) == 3


def test_a_failure_while_carrying_costs_time_and_not_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = known()

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("cacheclip_rag.model.rotary.PerTokenRotation.__call__", broken)
    result = engine.prefill(TEXT, method="auto")
    assert "broken" in result.report.fallbacks[0]
    assert torch.equal(result.logits, engine.prefill(TEXT, method="full").logits)


def test_bad_parameters_are_refused() -> None:
    for parameters in ({"carry": float("nan")}, {"carry": -1}, {"weight": -0.5}, {"weight": float("nan")}):
        with pytest.raises(ConfigurationError, match="at least 0"):
            Carry(**parameters)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError):
        resolve("auto:carry=much")


def test_on_real_weights_the_rest_of_the_chunks_comes_nearer_to_full_prefill(smollm2: Backbone) -> None:
    """SmolLM2-135M: squared distance of the keys that are not recomputed, over all layers, with a tenth recomputed."""
    engine = Engine(smollm2, method="auto")
    engine.ensure(PASSAGES)
    content = "\n\n".join(PASSAGES) + "\n\nWho installed the paraffin burner, and when?"
    prompt = engine.backbone.chat([{"role": "user", "content": content}])
    full = engine.prefill(prompt, method="full").canvas
    errors = []
    for carry in (0, 0.5):
        result, request, seen = watch(engine, resolve("auto", carry=carry), prompt, recompute_ratio=0.1)
        rest = request.rows[~torch.isin(request.rows, seen["chosen"])]
        assert result.canvas is not None and full is not None
        errors.append(float((result.canvas.keys[:, 0, :, rest] - full.keys[:, 0, :, rest]).square().sum()))
    assert errors[1] < 0.9 * errors[0]
