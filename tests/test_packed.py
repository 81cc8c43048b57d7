"""Packed weights: the same values in another layout, so the same logits and the same namespace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.model.packed import PackedLinear, pack
from cacheclip_rag.weights.pull import resolve

MODEL = "smollm2-135m-instruct"

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 instructions"
)


@pytest.fixture(scope="module")
def pair() -> tuple[Backbone, Backbone]:
    folder = resolve(MODEL)
    return tuple(Backbone.load(folder, dtype="bfloat16", device="cpu", packed=packed) for packed in (False, True))  # type: ignore[return-value]


@pytest.mark.parametrize("rows", [1, 2, 6, 17, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_computes_what_the_plain_one_does(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 96, bias=bias)).to(torch.bfloat16)
    x = torch.randn(1, rows, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected, exact = (
            plain(x),
            nn.functional.linear(
                x.double(), plain[0].weight.double(), None if plain[0].bias is None else plain[0].bias.double()
            ),
        )
        assert pack(plain) == 1 and isinstance(plain[0], PackedLinear)
        packed = plain(x)
    error = (expected - exact).norm()
    assert (packed - exact).norm() <= 1.05 * error + 1e-6


def test_every_linear_layer_of_a_loaded_model_is_packed_and_nothing_of_its_identity_changes(
    pair: tuple[Backbone, Backbone],
) -> None:
    plain, packed = pair
    assert not any(isinstance(module, PackedLinear) for module in plain.model.modules())
    assert not any(type(module) is nn.Linear for module in packed.model.modules())
    assert packed.fingerprint() == plain.fingerprint()
    theirs, ours = plain.model.state_dict(), packed.model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_it_answers_as_the_plain_model_up_to_rounding(pair: tuple[Backbone, Backbone]) -> None:
    ids = pair[0].tokenise("The fox sleeps in its den while the rain falls on the hills around it. " * 8).ids
    logits = []
    for backbone in pair:
        canvas = backbone.canvas(len(ids))
        rows = torch.arange(len(ids))
        backbone.forward(ids[:-1], rows[:-1], canvas)
        logits.append(backbone.forward(ids[-1:], rows[-1:], canvas))
    plain, packed = logits
    assert (plain - packed).norm() / plain.norm() < 0.02


def test_weights_that_were_changed_before_packing_give_another_fingerprint() -> None:
    backbone = Backbone.load(resolve(MODEL), dtype="bfloat16", device="cpu", packed=False)
    before = backbone.fingerprint()
    with torch.no_grad():
        backbone.model.model.layers[3].mlp.up_proj.weight[2, 2] += 1.0
    assert backbone.fingerprint() != before
    pack(backbone.model)
    assert backbone.fingerprint() != before


def test_float32_and_the_users_own_model_stay_as_they_are() -> None:
    backbone = Backbone.load(resolve(MODEL), dtype="float32", device="cpu")
    assert not any(isinstance(module, PackedLinear) for module in backbone.model.modules())


@pytest.mark.parametrize("change", [nn.Module.float, nn.Module.half, lambda model: model.to("meta")])
def test_packed_weights_cannot_be_converted_and_the_error_names_the_way_out(
    pair: tuple[Backbone, Backbone], change
) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigurationError, match="packed=False"):
        change(PackedLinear(nn.Linear(8, 8).to(torch.bfloat16)))


def test_a_copy_shares_the_packed_weight_and_an_unpacked_layer_computes_the_same() -> None:
    torch.manual_seed(0)
    packed = PackedLinear(nn.Linear(64, 96).to(torch.bfloat16))
    x = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    twin, plain = copy.deepcopy(packed), packed.unpacked()
    assert twin is not packed and twin._packed is packed._packed and twin.bias is not packed.bias
    assert type(plain) is nn.Linear and torch.equal(plain.weight, packed.weight)
    with torch.inference_mode():
        assert torch.equal(twin(x), packed(x)) and torch.equal(plain(x), packed(x))
