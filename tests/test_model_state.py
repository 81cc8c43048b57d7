"""KV belongs to the model as it was: changed weights, modes and hooks, and what the caller has switched on in torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import distance
from tiny import PASSAGES, byte_tokenizer, prompt_of, tiny_model

from cacheclip_rag import Backbone, Engine


@pytest.fixture
def backbone() -> Backbone:
    """One of its own, to be changed."""
    return Backbone(copy.deepcopy(tiny_model("llama")), byte_tokenizer())


def trained(model: torch.nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)


def another_weight(model: Any) -> None:
    layer = model.model.layers[0].mlp
    layer.up_proj.weight = torch.nn.Parameter(layer.up_proj.weight * 2)


def buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def hook(model: Any) -> None:
    model.model.layers[1].register_forward_hook(lambda module, given, output: output)


def before(model: Any) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda module, given: None)


def adapter(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.active_adapters = ["french"]


CHANGES: list[Callable[[Any], object]] = [
    trained,
    another_weight,
    buffer,
    hook,
    before,
    adapter,
    lambda model: model.train(),
    lambda model: model.model.layers[0].train(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_kv_of_a_changed_model_is_neither_served_nor_stored(
    backbone: Backbone, change: Callable[[Any], object], tmp_path: Path
) -> None:
    engine = Engine(backbone, store=tmp_path)
    engine.ensure(PASSAGES[:2])
    held = len(list(engine.library.store.entries()))
    change(backbone.model)
    asked = prompt_of(engine, PASSAGES[:3])
    report = engine.prefill(asked).report
    assert "put it back" in report.fallbacks[0] and report.fresh == report.prompt_tokens
    done = engine.ensure(PASSAGES[2:4])
    assert done.keys == [] and "put it back" in done.skipped[0][1]
    assert engine.fuse({PASSAGES[1]: [PASSAGES[0]]}).skipped
    engine.ensure_later(PASSAGES[4:])
    engine.flush()
    assert len(list(Engine(tiny_backbone_again(), store=tmp_path).library.store.entries())) == held


def tiny_backbone_again() -> Backbone:
    return Backbone(copy.deepcopy(tiny_model("llama")), byte_tokenizer())


def test_a_model_that_is_put_back_is_reused_again(backbone: Backbone) -> None:
    engine = Engine(backbone)
    engine.ensure(PASSAGES)
    asked = prompt_of(engine, PASSAGES)
    expected = engine.prefill(asked).logits
    backbone.model.train()
    assert engine.prefill(asked).report.fallbacks
    backbone.model.eval()
    again = engine.prefill(asked)
    assert again.report.fallbacks == [] and again.report.reused > 0 and distance(again.logits, expected) < 1e-5


@pytest.mark.parametrize("change", [trained, another_weight, hook, adapter])
def test_another_state_of_a_model_has_another_namespace(backbone: Backbone, change: Callable[[Any], object]) -> None:
    before = Engine(backbone).library.namespace.digest
    change(backbone.model)
    engine = Engine(backbone)
    assert engine.library.namespace.digest != before
    engine.ensure(PASSAGES)
    assert engine.prefill(prompt_of(engine, PASSAGES)).report.fallbacks == []


def test_using_a_model_does_not_change_it(backbone: Backbone) -> None:
    """Nor do other engines, verification's attention, and transformers' own generation."""
    state = backbone.state()
    with Engine(backbone, method="auto") as engine:
        engine.ensure(PASSAGES)
        engine.generate(prompt_of(engine, PASSAGES), max_new_tokens=3)
        engine.generate("Hello.", max_new_tokens=3, temperature=0.7)
    backbone.own_logits(torch.arange(5), 1)
    backbone.model.generate(torch.arange(5)[None], max_new_tokens=2, do_sample=False)
    assert backbone.state() == state


def test_an_auxiliary_model_that_changed_selects_nothing(backbone: Backbone) -> None:
    engine = Engine(tiny_backbone_again(), auxiliary=backbone)
    engine.ensure(PASSAGES)
    trained(backbone.model)
    assert "put it back" in engine.prefill(prompt_of(engine, PASSAGES)).report.fallbacks[0]


# ---- what the caller has switched on ---------------------------------------------------------------------------------


class Default(AbstractContextManager[None]):
    """A default of torch, for a while."""

    def __init__(self, setting: Callable[[Any], object], value: Any, back: Any) -> None:
        self.setting, self.value, self.back = setting, value, back

    def __enter__(self) -> None:
        self.setting(self.value)

    def __exit__(self, *_: object) -> None:
        self.setting(self.back)


def surroundings() -> Iterator[Any]:
    yield pytest.param(lambda: torch.autocast("cpu", dtype=torch.bfloat16), id="autocast")
    yield pytest.param(lambda: torch.autocast("cpu", dtype=torch.float16), id="autocast float16")
    yield pytest.param(lambda: Default(torch.set_default_device, "meta", None), id="default device")
    yield pytest.param(lambda: torch.device("meta"), id="device context")
    yield pytest.param(lambda: Default(torch.set_default_dtype, torch.float64, torch.float32), id="default dtype")
    yield pytest.param(torch.inference_mode, id="inference mode")
    yield pytest.param(torch.enable_grad, id="grad")


@pytest.mark.parametrize("around", list(surroundings()))
@pytest.mark.parametrize("method", ["auto", "cacheclip", "cachecraft", "droidspeak", "sel", "prefix-cache"])
def test_the_callers_torch_settings_change_neither_reuse_nor_what_is_stored(method: str, around: Any) -> None:
    backbone = tiny_backbone_again()
    auxiliary = tiny_backbone_again() if method == "cacheclip" else None
    plain, other = (Engine(backbone, auxiliary=auxiliary, method=method) for _ in range(2))
    asked = prompt_of(plain, PASSAGES)
    plain.ensure(PASSAGES)
    with around():
        done = other.ensure(PASSAGES)
        answers = [other.generate(asked, max_new_tokens=3) for _ in range(2)]
    expected = [plain.generate(asked, max_new_tokens=3) for _ in range(2)]
    assert done.skipped == []
    for answer, same in zip(answers, expected, strict=True):
        assert answer.report.fallbacks == [] and answer.ids == same.ids
        assert (answer.report.reused, answer.report.recomputed) == (same.report.reused, same.report.recomputed)
    assert other.generate(asked, max_new_tokens=3).ids == expected[1].ids, "and afterwards"
    if plain.method.ahead:
        kept = [engine.library_of(method).get(done.keys[0]) for engine in (plain, other)]
        assert kept[0] is not None and kept[1] is not None
        assert kept[1].keys.dtype == torch.float32 and distance(kept[1].keys, kept[0].keys) < 1e-6
