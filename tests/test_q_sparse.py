"""The Triton kernel against the eager oracle: on a GPU compiled, elsewhere in Triton's interpreter."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import CASES, TOLERANCE, both, distance, scattered
from tiny import tiny_model

from cacheclip_rag.methods.attend.scaled import ScaledContext
from cacheclip_rag.methods.scores import AttentionScores
from cacheclip_rag.model.attention import (
    AUTO,
    REFERENCE,
    SDPA,
    TRITON,
    choose,
    implementations,
)
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.model.canvas import Canvas

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mends Triton's interpreter: it keeps bfloat16 as uint16, and its `tl.dot` multiplies those (issue 11584)."""
    if DEVICE.type == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    )


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_computes_what_the_oracle_computes(case, dtype, multiplies_bfloat16):
    ours, expected = both(CASES[case], dtype, DEVICE)
    assert ours.shape == expected.shape and ours.dtype == dtype
    assert distance(ours, expected) < TOLERANCE[dtype]


# ---- through a model ---------------------------------------------------------------------------------------------

IDS = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(1))
OTHER = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(2))
ROWS = torch.tensor([*scattered(30, 80), *range(85, 100)])


@functools.cache
def backbone(kind: str, attention: str) -> Backbone:
    from tiny import byte_tokenizer

    return Backbone(tiny_model(kind).to(DEVICE), byte_tokenizer(), attention=attention)


def prefilled(model: Backbone) -> Canvas:
    """All of `OTHER`. Its first row goes alone, so that the rest is no ordinary triangle, which SDPA would take."""
    canvas = model.canvas(len(OTHER))
    model.forward(OTHER[:1], torch.arange(1), canvas, logits=0)
    model.forward(OTHER[1:], torch.arange(1, len(OTHER)), canvas, logits=0)
    return canvas


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every call of the kernel."""
    from cacheclip_rag.model.attention import q_sparse

    seen, kernel = [], q_sparse.q_sparse_attention

    def counted(query, *args):
        seen.append(query.shape[2])
        return kernel(query, *args)

    monkeypatch.setattr(q_sparse, "q_sparse_attention", counted)
    return seen


@needs_triton
@pytest.mark.parametrize("kind", ["llama", "mistral-sliding", "gemma3"])
def test_a_model_prefilled_and_recomputed_by_the_kernel_gives_the_oracles_logits(kind, launches):
    logits, kv, scores = {}, {}, {}
    for attention in (REFERENCE, TRITON):
        model = backbone(kind, attention)
        assert model.obstacle is None
        launches.clear()
        canvas = prefilled(model)
        seen = AttentionScores(ROWS[-15:].to(DEVICE), torch.arange(80, device=DEVICE), model.full_layers)
        logits[attention] = model.forward(IDS[ROWS], ROWS, canvas, logits=len(ROWS), hooks=[seen])
        kv[attention], scores[attention] = canvas.read(slice(None)), seen.scores
        expected = [99] * model.layers + [len(ROWS)] * model.layers if attention == TRITON else []
        assert launches == expected
    assert distance(logits[TRITON], logits[REFERENCE]) < 1e-4
    assert distance(scores[TRITON], scores[REFERENCE]) < 1e-4
    assert all(distance(ours, theirs) < 1e-4 for ours, theirs in zip(kv[TRITON], kv[REFERENCE], strict=True))


@needs_triton
def test_what_the_kernel_is_not_for_goes_another_way(launches):
    """A whole prompt, a decoded row, and rows that weigh the context otherwise."""
    logits = {}
    for attention in (REFERENCE, TRITON):
        model = backbone("llama", attention)
        canvas = model.canvas(101)
        context = torch.arange(101, device=DEVICE) < 80
        logits[attention] = [
            model.forward(IDS, torch.arange(100), canvas, logits=100),
            model.forward(IDS[:1], torch.tensor([100]), canvas),
            model.forward(OTHER[ROWS], ROWS, canvas, logits=9, score_mod=ScaledContext(context, 0.5, 0.9)),
        ]
    assert launches == []
    assert all(distance(a, b) < 1e-4 for a, b in zip(logits[TRITON], logits[REFERENCE], strict=True))


# ---- which implementation a device gets --------------------------------------------------------------------------

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def chosen(name: str, device: torch.device) -> str:
    return choose(name, device, torch.float32, 16)


@pytest.mark.parametrize(("installed", "right", "expected"), [(1, 1, TRITON), (1, 0, SDPA), (0, 1, SDPA)])
def test_a_gpu_gets_the_kernel_where_it_is_installed_and_right(monkeypatch, installed, right, expected):
    monkeypatch.setattr(implementations, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(implementations, "kernel_is_right", lambda *where: bool(right))
    assert chosen(AUTO, GPU) == expected
    assert chosen(AUTO, CPU) == SDPA, "never on a CPU"
    assert chosen(REFERENCE, GPU) == REFERENCE


def test_asking_for_the_kernel_where_it_cannot_run_says_so(monkeypatch):
    monkeypatch.setattr(implementations, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install triton"):
        chosen(TRITON, GPU)
    monkeypatch.setattr(implementations, "find_spec", lambda name: 1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert chosen(TRITON, GPU) == TRITON
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu"):
        chosen(TRITON, CPU)


@needs_triton
def test_a_kernel_that_fails_or_errs_is_not_taken(monkeypatch, caplog):
    from cacheclip_rag.model.attention import q_sparse

    tried = implementations.kernel_is_right.__wrapped__
    caplog.set_level(logging.WARNING, logger="cacheclip_rag")
    assert tried(DEVICE, torch.float32, 16) and not caplog.records
    right = q_sparse.q_sparse_attention
    monkeypatch.setattr(q_sparse, "q_sparse_attention", lambda *args: right(*args) * 1.1)
    assert not tried(DEVICE, torch.float32, 16) and "off by 10%" in caplog.text

    def fails(*args):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(q_sparse, "q_sparse_attention", fails)
    assert not tried(DEVICE, torch.float32, 16) and "Failed to find C compiler" in caplog.text


# ---- without a GPU, compiled for one -----------------------------------------------------------------------------

COMPILE = """
import runpy, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
room = runpy.run_path(sys.argv[1])
kernel, (tile, padded) = room["kernel"], room["tile_of"](80, 2)
constants = dict(GROUPS=2, WIDTH=80, PADDED=padded, TILE=tile, WINDOW=100, SOFTCAP=50.0)
kinds = dict.fromkeys(["query", "key", "value", "output"], "*bf16") | {"rows": "*i64", "scaling": "fp32"}
kinds |= dict.fromkeys(constants, "constexpr")
source = ASTSource(kernel, {name: kinds.get(name, "i32") for name in kernel.arg_names}, constants)
compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_stages": 2})
assert compiled.asm["cubin"]
print(compiled.metadata.shared)
"""


@needs_triton
def test_it_compiles_for_a_gpu_and_fits_into_its_shared_memory(tmp_path):
    """The interpreter forgives what the compiler does not."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    path = Path(implementations.__file__).with_name("q_sparse.py")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 64 << 10
