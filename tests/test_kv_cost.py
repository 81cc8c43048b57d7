"""The arithmetic of docs/scaling.md: against models of transformers, and the page against the script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

SCRIPT = Path(__file__).parent.parent / "tools" / "scripts" / "kv_cost.py"
sys.path.insert(0, str(SCRIPT.parent))

from kv_cost import MODELS, Shape  # noqa: E402


def test_the_page_shows_what_the_script_computes() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def shape() -> Shape:
    return Shape(layers=3, hidden=64, heads=4, kv_heads=2, head_dim=32, intermediate=96)


@pytest.fixture
def model(shape: Shape) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=50,
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
    )
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


def test_weights_and_bytes_are_a_models_own(shape: Shape, model: torch.nn.Module) -> None:
    layers = [module for name, module in model.named_modules() if ".layers." in name]
    assert shape.weights == sum(part.weight.numel() for part in layers if isinstance(part, torch.nn.Linear))
    cache = model(torch.arange(7)[None], use_cache=True).past_key_values
    stored = sum(kv.nbytes for layer in cache.layers for kv in (layer.keys, layer.values))
    assert 7 * shape.kv_bytes() == stored


def test_flops_are_those_that_torch_counts(shape: Shape, model: torch.nn.Module) -> None:
    """Torch counts all pairs of tokens, not only the causal ones, and the head's multiplications."""
    from torch.utils.flop_counter import FlopCounterMode

    model.set_attn_implementation("eager")
    count = 64
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(count)[None] % 50, use_cache=False)
    head = 2 * count * 50 * shape.hidden
    pairs = 4 * shape.layers * shape.heads * shape.head_dim * count * count
    assert counter.get_total_flops() - head - pairs // 2 == pytest.approx(count * shape.flops(count), rel=0.01)


@pytest.mark.parametrize(
    ("name", "kib", "billions"),
    [("Qwen2.5-7B", 56, 6.53), ("Llama-3.1-8B", 128, 6.98), ("Qwen2.5-32B", 256, 31.0), ("Llama-3.1-70B", 320, 68.5)],
)
def test_models_have_the_sizes_that_their_cards_say(name: str, kib: int, billions: float) -> None:
    """Without embeddings: Qwen's model cards say 6.53B and 31.0B."""
    assert MODELS[name].kv_bytes() == kib << 10
    assert MODELS[name].weights / 1e9 == pytest.approx(billions, rel=0.01)


def test_at_the_break_even_both_take_as_long(shape: Shape) -> None:
    prompt, ratio, compute = 1000, 0.2, 1e12
    speed = shape.break_even(prompt, ratio, compute)
    computed = shape.flops(prompt) / compute
    assert shape.kv_bytes() / speed + ratio * computed == pytest.approx(computed)
