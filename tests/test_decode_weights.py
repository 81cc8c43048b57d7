"""4-bit weights for decoding: near the model's own, read by decoding steps of few rows and by nothing else."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from tiny import PASSAGES, SHAPE, byte_tokenizer, prompt_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from cacheclip_rag import ConfigurationError, Engine
from cacheclip_rag.model.adapter import twin
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.model.decode_weights import GROUP, ROWS, DecodeWeights, decoding, quantise
from cacheclip_rag.model.packed import pack


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose layers are wide enough for the kernel. Its weights are narrow, as trained ones are."""
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("model")
    config = LlamaConfig(**{**SHAPE, "vocab_size": 288, "hidden_size": 128, "head_dim": 32, "initializer_range": 0.06})
    AutoModelForCausalLM.from_config(config).save_pretrained(made)
    byte_tokenizer().save_pretrained(made)
    return made


def off(ours: Tensor, expected: Tensor) -> float:
    return float((ours.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_with_each_weight_at_the_nearest_of_its_groups_sixteen_values(
    dtype: torch.dtype, rows: int, bias: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 64, bias=bias).to(dtype)
    x = torch.randn(1, rows, 96).to(dtype)
    groups = layer.weight.detach().float().view(64, 96 // GROUP, GROUP)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (high - low) / 15
    rounded = (low + ((groups - low) / step).round() * step).view(64, 96)
    with torch.inference_mode():
        own = layer(x)
        expected = nn.functional.linear(x.float(), rounded, None if layer.bias is None else layer.bias.float())
        made = DecodeWeights(nn.Sequential(layer))
        with decoding():
            ours = layer(x)
    assert ours.shape == own.shape and ours.dtype == dtype
    assert off(ours, expected) < (0.03 if dtype == torch.bfloat16 else 1e-4) < off(own, expected)
    assert made.nbytes == 64 * 96 // 2 + 2 * 64 * 96 // GROUP * layer.weight.element_size()


def test_a_group_of_equal_weights_stays_what_it_is() -> None:
    layer = nn.Linear(GROUP, 32, bias=False)
    layer.weight.data.fill_(0.25)
    DecodeWeights(nn.Sequential(layer))
    with torch.inference_mode(), decoding():
        assert torch.allclose(layer(torch.ones(1, GROUP)), torch.full((1, 32), 0.25 * GROUP), rtol=1e-3)


def test_only_few_rows_of_decoding_on_this_thread_read_4_bits() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    one, many = torch.randn(1, 64), torch.randn(ROWS + 1, 64)
    own = layer(one), layer(many)
    DecodeWeights(nn.Sequential(layer))
    elsewhere: list[Tensor] = []
    assert torch.equal(layer(one), own[0]), "a prefill of one row"
    with decoding():
        with decoding():  # a step of another stream, in a pause of this one
            assert not torch.equal(layer(one), own[0])
        assert not torch.equal(layer(one), own[0])
        assert torch.equal(layer(many), own[1])
        other = threading.Thread(target=lambda: elsewhere.append(layer(one)))
        other.start()
        other.join()
    assert torch.equal(layer(one), own[0])
    assert torch.equal(elsewhere[0], own[0])


def test_layers_that_the_kernel_does_not_take_and_adapters_read_their_own_weights() -> None:
    class Adapter(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(GROUP - 2, 64), Adapter(64, 32), nn.Linear(32, 40))
    x = torch.randn(1, GROUP - 2)
    own = model(x)
    assert DecodeWeights(model).nbytes == 0
    with decoding():
        assert torch.equal(model(x), own)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_and_prompts_are_the_same_and_logits_of_decoding_are_close(folder: Path, dtype: str) -> None:
    plain, quantised = (
        Engine(folder, dtype=dtype, device="cpu", method="naive", decode_weights=chosen) for chosen in ("auto", "int4")
    )
    assert plain.backbone.fingerprint() == quantised.backbone.fingerprint(), "they share a store"
    logits, steps = [], []
    for engine in (plain, quantised):
        engine.ensure(PASSAGES[:3])
        ready = engine.prefill(prompt_of(engine, PASSAGES[:3]))
        assert ready.report.reused and not ready.report.fallbacks
        logits.append(ready.logits)
        count = len(ready.layout)
        steps.append(torch.cat([ready.step(torch.tensor([65 + n]), count + n) for n in range(3)]))
    assert torch.equal(*logits)
    for text in PASSAGES[:3]:
        one, other = (engine.library.get(engine.library.key(text)) for engine in (plain, quantised))
        assert one is not None and other is not None and torch.equal(one.keys, other.keys)
    assert 1e-3 < off(steps[1], steps[0]) < 0.2


def test_streams_that_share_passes_answer_as_alone(folder: Path) -> None:
    with Engine(folder, dtype="float32", device="cpu", decode_weights="int4", prompt_lookup=0) as engine:
        engine.ensure(PASSAGES[:3])
        prompts = [prompt_of(engine, PASSAGES[:3], f"Question {number}?") for number in range(3)]
        alone = [engine.generate(prompt, max_new_tokens=16, min_new_tokens=16).ids for prompt in prompts]
        together: dict[int, tuple[int, ...]] = {}

        def ask(number: int) -> None:
            together[number] = engine.generate(prompts[number], max_new_tokens=16, min_new_tokens=16).ids

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [together[number] for number in range(3)] == alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_can_be_copied_with_it(folder: Path, dtype: str) -> None:
    backbone = Backbone.load(folder, dtype=dtype, device="cpu", decode_weights="int4")
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode(), decoding():
        assert torch.equal(copy.deepcopy(backbone.model)(ids).logits, backbone.model(ids).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_that_an_adapter_changes_reads_its_changed_weights(folder: Path, dtype: str) -> None:
    """Not the 4 bits of what they were."""
    backbone = Backbone.load(folder, dtype=dtype, device="cpu", decode_weights="int4")
    name = "model.layers.0.mlp.down_proj"
    adapted = twin(backbone.model, {name})
    layer, before = adapted.get_submodule(name), backbone.model.get_submodule(name)
    x = torch.randn(1, 128).to(backbone.dtype)
    with torch.inference_mode(), decoding():
        layer.weight.mul_(2)
        assert off(layer(x), 2 * nn.functional.linear(x, before.weight)) < 1e-2
        assert off(before(x), nn.functional.linear(x, before.weight)) > 1e-2, "the model's own still reads 4 bits"


def test_a_packed_layer_is_quantised_as_the_plain_one() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    packed = copy.deepcopy(plain)
    if not pack(packed):
        pytest.skip("this CPU has no bfloat16 instructions")
    x = torch.randn(1, 64).bfloat16()
    assert DecodeWeights(plain).nbytes == DecodeWeights(packed).nbytes > 0
    with torch.inference_mode(), decoding():
        assert torch.equal(plain(x), packed(x))


@pytest.mark.parametrize("wrong", ["int8", "q4_0", None, 4])
def test_an_unknown_format_is_refused_before_anything_is_loaded(wrong: object) -> None:
    with pytest.raises(ConfigurationError, match=r'decode_weights must be "auto" .* or "int4", not'):
        Engine("there-is-no-such-model", decode_weights=wrong)  # type: ignore[arg-type]


def test_a_backbone_that_was_loaded_without_it_is_refused_with_the_remedy(folder: Path) -> None:
    backbone = Backbone.load(folder, dtype="float32", device="cpu")
    with pytest.raises(ConfigurationError, match=r'Backbone\.load\(\.\.\., decode_weights="int4"\)'):
        Engine(backbone, decode_weights="int4")
    Engine(Backbone.load(folder, dtype="float32", device="cpu", decode_weights="int4"), decode_weights="int4").close()


def test_it_is_for_cpus() -> None:
    with pytest.raises(ConfigurationError, match="on the CPU, not on meta"):
        DecodeWeights(nn.Linear(64, 64, device="meta"))


def test_quantise_keeps_the_extremes_of_each_group() -> None:
    """The least and the greatest weight of a group are two of its sixteen values."""
    torch.manual_seed(0)
    layer = nn.Linear(GROUP, 32, bias=False)
    packed, scales = quantise(layer.weight)
    identity = torch.eye(GROUP)
    with torch.inference_mode():
        back = torch._weight_int4pack_mm_for_cpu(identity, packed, GROUP, scales).T
    assert torch.allclose(back.amax(1), layer.weight.amax(1), atol=1e-4)
    assert torch.allclose(back.amin(1), layer.weight.amin(1), atol=1e-4)
