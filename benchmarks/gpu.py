"""Reuse on one CUDA GPU: is it right, and how fast is it? Without network or weights, in under eight minutes.

    python benchmarks/gpu.py --out gpu.jsonl
    python benchmarks/gpu.py --device cpu --small    # the same steps with tiny models, to try the script

Models have random weights and the shapes of SmolLM2-135M, Qwen2.5-1.5B and Llama-3.1-8B, in bfloat16; a token is a
byte. It needs PyTorch, transformers, Triton and this repository, from which it may run without being installed. Rows of
JSON go to --out as they come, tables to the terminal. What does not fit into --minutes is listed as left out. Exits
with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

Row = dict[str, Any]

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROOM = dict(max_position_embeddings=131072, eos_token_id=257, bos_token_id=None)


def shape(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> Row:
    return dict(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **ROOM,
        **more,
    )


MODELS: dict[str, Callable[[], Any]] = {
    "SmolLM2-135M": lambda: LlamaConfig(**shape(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True)),
    "Qwen2.5-1.5B": lambda: Qwen2Config(**shape(151936, 1536, 8960, 28, 12, 2, tie_word_embeddings=True)),
    "Llama-3.1-8B": lambda: LlamaConfig(**shape(128256, 4096, 14336, 32, 32, 8, rope_parameters=LLAMA3)),
}
SMALL: dict[str, Callable[[], Any]] = {
    "small Llama": lambda: LlamaConfig(**shape(1000, 192, 256, 3, 3, 1, tie_word_embeddings=True)),
    "small Qwen2": lambda: Qwen2Config(**shape(1000, 256, 512, 2, 4, 2, tie_word_embeddings=True)),
}
HEADS = {"SmolLM2-135M": (9, 3, 64), "Qwen2.5-1.5B": (12, 2, 128), "Llama-3.1-8B": (32, 8, 128)}
"""Query heads, KV heads and head dimension, for the kernel at length."""

RATIOS = (0.0, 0.1, 0.2)
SEEN = 64
"""Rows of a long case that are compared with the oracle, which is quadratic."""
BOUND = 0.1
"""Relative error of bfloat16 logits that rounding explains, as in `cacheclip_rag.verification`."""


@dataclass
class Run:
    """What all steps share: where they compute, the rows so far, and until when."""

    device: torch.device
    small: bool
    minutes: float
    out: Path | None
    repeats: int
    rows: list[Row] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    def add(self, section: str, **row: Any) -> Row:
        made = {"section": section, **row}
        self.rows.append(made)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(json.dumps(made) + "\n")
        print(f"{time.monotonic() - self.begun:5.0f} s  {json.dumps(made)}", file=sys.stderr, flush=True)
        return made

    def check(self, what: str, found: float, limit: float, **more: Any) -> None:
        self.add("check", what=what, found=found, limit=limit, passed=bool(found <= limit), **more)

    def time_for(self, what: str, minutes: float) -> bool:
        """Whether there is time for a step that may take so long; else it is noted as left out."""
        if self.small or (time.monotonic() - self.begun) / 60 + minutes <= self.minutes:
            return True
        self.add("left out", what=what)
        return False

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Triton's interpreter does not multiply bfloat16."""
        return [torch.float32, torch.float16, *([torch.bfloat16] if self.device.type == "cuda" else [])]

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return 128 if self.small else 512

    @property
    def lengths(self) -> list[int]:
        return [600, 1500] if self.small else [4096, 16384, 32768]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any]) -> float:
        """The median of a few calls, after one to warm up."""
        taken = []
        for _ in range(self.repeats + 1):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            taken.append(time.perf_counter() - start)
        return median(taken[1:])

    def peak(self, call: Callable[[], Any]) -> float | None:
        """GiB of GPU memory that a call has at its peak, weights included."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        return round(torch.cuda.max_memory_allocated() / (1 << 30), 2)


# ---- the kernel ------------------------------------------------------------------------------------------------------


def kernel(run: Run) -> None:
    """The Triton kernel against the oracle: every shape of the tests, then long prompts of which a tenth is computed."""
    from kernel_cases import CASES, TOLERANCE, both, distance

    for dtype in run.dtypes:
        worst = {name: distance(*both(case, dtype, run.device)) for name, case in CASES.items()}
        name = max(worst, key=lambda name: worst[name])
        label = str(dtype).removeprefix("torch.")
        run.check(f"kernel, {len(CASES)} shapes, {label}", worst[name], TOLERANCE[dtype], worst=name)
    for name, (heads, kv_heads, width) in HEADS.items():
        for keys in (192,) if run.small else (4096, 16384, 65536):
            if run.time_for(f"kernel at {keys} keys", 0.2):
                long_kernel(run, name, heads, kv_heads, width, keys)


def long_kernel(run: Run, name: str, heads: int, kv_heads: int, width: int, keys: int) -> None:
    from types import SimpleNamespace

    from kernel_cases import TOLERANCE, distance, scattered

    from cacheclip_rag.model.attention import SparseRows, reference_attention, sdpa_attention
    from cacheclip_rag.model.attention.q_sparse import q_sparse_attention

    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    made = torch.Generator().manual_seed(keys)
    rows = torch.tensor(sorted({*scattered(keys // 10, keys), *range(keys - SEEN, keys)}))
    query, key, value = (
        torch.randn(1, count, length, width, generator=made).to(run.device, dtype)
        for count, length in ((heads, len(rows)), (kv_heads, keys), (kv_heads, keys))
    )
    sparse, layer, on_device = SparseRows(rows, run.device), SimpleNamespace(layer_idx=0), rows.to(run.device)

    def ours() -> torch.Tensor:
        return q_sparse_attention(query, key, value, on_device, width**-0.5)

    some = torch.linspace(0, len(rows) - 1, SEEN).long()
    expected, _ = reference_attention(
        layer, query[:, :, some.to(run.device)], key, value, None, cacheclip=SparseRows(rows[some], run.device)
    )
    error = distance(ours()[:, some.to(run.device)], expected)
    run.check(f"kernel, {len(rows)} rows of {keys} keys, heads of {name}", error, TOLERANCE[dtype])
    if run.small:  # the interpreter's time says nothing
        return
    whole = torch.randn(1, heads, keys, width, generator=made).to(run.device, dtype)
    run.add(
        "kernel",
        shape=name,
        keys=keys,
        rows=len(rows),
        kernel_ms=1000 * run.seconds(ours),
        sdpa_ms=1000 * run.seconds(lambda: sdpa_attention(layer, query, key, value, None, cacheclip=sparse)),
        full_ms=1000
        * run.seconds(
            lambda: torch.nn.functional.scaled_dot_product_attention(whole, key, value, is_causal=True, enable_gqa=True)
        ),
    )


# ---- devices and copies ----------------------------------------------------------------------------------------------


def copies(run: Run) -> float:
    """Bytes a second from host to device, from ordinary and from pinned memory; returns the faster."""
    size = (1 << 24) if run.small else (1 << 30)
    ordinary = torch.empty(size, dtype=torch.uint8)
    ordinary.fill_(1)
    target = torch.empty_like(ordinary, device=run.device)
    rates = {"ordinary": size / run.seconds(lambda: target.copy_(ordinary))}
    if run.device.type == "cuda":
        pinned = ordinary.pin_memory()
        rates["pinned"] = size / run.seconds(lambda: target.copy_(pinned, non_blocking=True))
    for kind, rate in rates.items():
        run.add("copy", memory=kind, bytes=size, gb_s=rate / 1e9)
    return max(rates.values())


def default_device(run: Run) -> None:
    """With PyTorch's default device set to the GPU, an engine answers as without."""
    from cacheclip_rag import Engine

    with Engine(backbone(run, next(iter(SMALL.values())))) as engine:
        texts = [text_of(run.chunk, seed) for seed in range(8)]
        first, second = (prompt_of(engine, some, "Which?") for some in (texts[:4], texts[4:]))
        engine.ensure(texts[:4])
        answers = [engine.generate(first, max_new_tokens=8, recompute_ratio=0.2)]
        torch.set_default_device(run.device)
        try:
            engine.ensure(texts[4:])
            answers += [engine.generate(each, max_new_tokens=8, recompute_ratio=0.2) for each in (first, second)]
        finally:
            torch.set_default_device(None)
        fallbacks = [reason for answer in answers for reason in answer.report.fallbacks]
        run.check("default device on the GPU: fallbacks", len(fallbacks), 0, fallbacks=fallbacks)
        without = sum(not answer.report.reused for answer in answers)
        run.check("default device on the GPU: prompts without reuse", without, 0)
        other = answers[0].ids != answers[1].ids
        run.check("default device on the GPU: other answers than before", int(other), 0)


# ---- models ----------------------------------------------------------------------------------------------------------


def backbone(run: Run, config: Callable[[], Any]) -> Any:
    """A random model of this shape with a byte tokenizer."""
    from tiny import byte_tokenizer

    from cacheclip_rag.model.backbone import Backbone

    torch.manual_seed(0)
    with torch.device(run.device):  # the weights of eight billion parameters take a CPU minutes
        model = AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16)
    return Backbone(model, byte_tokenizer())


def text_of(length: int, seed: int) -> str:
    """Letters and blanks, a token each."""
    draw = random.Random(seed)
    return "".join(draw.choices("etaoin shrdlu", k=length - 1)).strip().ljust(length, ".")


def texts_of(run: Run, length: int) -> list[str]:
    """The chunks of a prompt of about ``length`` tokens."""
    return [text_of(run.chunk, seed) for seed in range((length - 100) // (run.chunk + 2))]


def prompt_of(engine: Any, texts: Sequence[str], question: str) -> str:
    return engine.backbone.chat([{"role": "user", "content": "\n\n".join(["Read.", *texts, question])}])


def models(run: Run, rate: float, wanted: Sequence[str]) -> None:
    from cacheclip_rag.verification import verify

    for name, config in (SMALL if run.small else MODELS).items():
        if wanted and name not in wanted:
            continue
        big = "8B" in name
        if not run.time_for(name, 1.5 if big else 0.7):
            continue
        model = backbone(run, config)
        run.add(
            "model", model=name, attention=model.attention, parameters=sum(p.numel() for p in model.model.parameters())
        )
        for one in verify(model).checks:
            run.check(f"{name}: {one.name}", one.found, one.limit)
        for length in run.lengths:
            if run.time_for(f"{name} at {length}", 0.8 if big else 0.4):
                first_tokens(run, name, model, length, rate)
        if run.time_for(f"{name}: decoding", 0.3):
            decoding(run, name, model)
        del model
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def first_tokens(run: Run, name: str, model: Any, length: int, rate: float) -> None:
    """Seconds to the first token: full prefill by transformers, and reuse with KV on the GPU, in host memory, on disk."""
    from cacheclip_rag import Engine
    from cacheclip_rag.store import MemoryStore, TieredStore

    with tempfile.TemporaryDirectory() as folder, Engine(model, store=folder, memory_bytes=64 << 30) as engine:
        texts = texts_of(run, length)
        start = time.perf_counter()
        engine.ensure(texts)
        encoding = time.perf_counter() - start
        prompt = prompt_of(engine, texts, "What is said about eta, and where?")
        ids = model.tokenise_prompt(prompt).ids
        expected = native(model, ids)
        full = run.seconds(lambda: native(model, ids))
        rows = {"full": full, "peak_full": run.peak(lambda: native(model, ids))}
        reused = engine.prefiller.strategies["compose"]
        redone = forced(engine, reused, prompt)
        run.check(f"{name}, {len(ids)} tokens: logits at r = 1 against transformers'", error(redone, expected), BOUND)

        library = engine.library
        disk = library.store.tiers[1]
        chunks = {library.key(text): library.get(library.key(text)) for text in texts}
        stores = {
            "host": dict(chunks),
            "GPU": {
                key: replace(chunk, keys=chunk.keys.to(run.device), values=chunk.values.to(run.device))
                for key, chunk in chunks.items()
            },
            "disk": {},
        }
        loading: dict[str, float] = {}
        for place, kept in stores.items():
            for ratio in RATIOS:
                taken, reports = [], []
                for _ in range(run.repeats + 1):
                    memory = MemoryStore(64 << 30)
                    for key, chunk in kept.items():
                        memory.put(key, chunk)
                    if place == "disk":
                        drop_page_cache(Path(folder))
                    library.store = TieredStore(memory, disk)
                    run.wait()
                    start = time.perf_counter()
                    result = engine.prefill(prompt, method="auto", recompute_ratio=ratio, room=16)
                    int(result.logits.argmax())
                    taken.append(time.perf_counter() - start)
                    reports.append(result.report)
                    del result
                report = reports[-1]
                seconds = median(taken[1:])
                loading[place] = median(
                    each.seconds.get("load", 0.0) + each.seconds.get("place", 0.0) for each in reports[1:]
                )
                run.add(
                    "first token",
                    model=name,
                    tokens=len(ids),
                    place=place,
                    ratio=ratio,
                    recomputed=round(report.ratio, 3),
                    not_loaded=sum(use.missing is not None for use in report.chunks),
                    seconds=seconds,
                    times_faster=full / seconds,
                    bound=report.bound,
                    stages={stage: round(value, 4) for stage, value in report.seconds.items()},
                    fallbacks=report.fallbacks,
                )
        library.store = TieredStore(MemoryStore(64 << 30), disk)
        peak = run.peak(lambda: engine.prefill(prompt, method="auto", recompute_ratio=0.1, room=16))
        run.add("full", model=name, tokens=len(ids), seconds=full, encoding=encoding, peak_gib=rows["peak_full"])
        run.add("memory", model=name, tokens=len(ids), peak_gib=peak, full_gib=rows["peak_full"])
        size = sum(chunk.nbytes for chunk in chunks.values()) / sum(map(len, chunks.values()))
        held = sum(map(len, chunks.values()))
        run.add(
            "loading",
            model=name,
            tokens=len(ids),
            bytes_a_token=size,
            computing_us=1e6 * full / len(ids),
            copying_us=1e6 * size / rate,
            **{f"{place}_us": 1e6 * seconds / held for place, seconds in loading.items()},
        )


def forced(engine: Any, compose: Any, prompt: str) -> torch.Tensor:
    """Logits with everything that was placed recomputed; an engine would answer ratio 1 by full prefill."""
    from cacheclip_rag import methods
    from cacheclip_rag.prefill.result import PrefillRequest
    from cacheclip_rag.report import Report

    report = Report("query_guided", 1.0)
    request = PrefillRequest(prompt, methods.resolve("query_guided"), 1.0, 16)
    return compose(request, engine.prefiller.read(request, report), report).logits


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    ours, expected = ours.float().cpu(), expected.float().cpu()
    return float((ours - expected).norm() / expected.norm())


def native(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The last token's logits by transformers' own full prefill with sdpa."""
    model.model.set_attn_implementation("sdpa")
    try:
        logits, _ = model.native_prefill(ids)
        int(logits.argmax())
        return logits
    finally:
        model.model.set_attn_implementation(model.attention)


def drop_page_cache(folder: Path) -> None:
    """So that loading reads the disk."""
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def decoding(run: Run, name: str, model: Any) -> None:
    """Tokens a second of one stream and of eight, behind prompts of the shortest length, beside ``generate``."""
    from cacheclip_rag import Engine

    length, tokens = run.lengths[0], 16 if run.small else 64
    with Engine(model, prompt_lookup=0) as engine:  # random weights repeat themselves, which drafts would profit from
        texts = texts_of(run, length)
        engine.ensure(texts)
        for streams in (1, 8):
            prompts = [prompt_of(engine, texts, f"Question {number}?") for number in range(streams)]
            for _ in range(2):  # the first warms up
                ours = stream_rate(run, engine, prompts, tokens)
            model.model.set_attn_implementation("sdpa")
            try:
                ids = torch.stack([model.tokenise_prompt(prompt).ids for prompt in prompts]).to(run.device)
                theirs = generate_rate(run, model, ids, tokens)
            finally:
                model.model.set_attn_implementation(model.attention)
            run.add("decoding", model=name, tokens=length, streams=streams, tokens_s=ours, generate_tokens_s=theirs)


def stream_rate(run: Run, engine: Any, prompts: Sequence[str], tokens: int) -> float:
    ready = threading.Barrier(len(prompts) + 1)
    failed: list[BaseException] = []

    def read(prompt: str) -> None:
        try:
            ids = iter(engine.stream(prompt, max_new_tokens=tokens, min_new_tokens=tokens, recompute_ratio=0.1))
            next(ids, None)
            ready.wait(300)
            for _ in ids:
                pass
        except BaseException as problem:
            failed.append(problem)
            ready.abort()

    threads = [threading.Thread(target=read, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    try:
        ready.wait(300)
    except threading.BrokenBarrierError:
        raise failed[0] if failed else TimeoutError("the streams did not begin") from None
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    run.wait()
    return len(prompts) * (tokens - 1) / (time.perf_counter() - start)


@torch.inference_mode()
def generate_rate(run: Run, model: Any, ids: torch.Tensor, tokens: int) -> float:
    def take(count: int) -> None:
        model.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count,
            pad_token_id=257,
        )  # fmt: skip

    return len(ids) * (tokens - 1) / max(1e-9, run.seconds(lambda: take(tokens)) - run.seconds(lambda: take(1)))


# ---- tables ----------------------------------------------------------------------------------------------------------

TABLES: dict[str, dict[str, str]] = {
    "check": {"what": "check", "found": "found", "limit": "at most", "passed": "passed"},
    "kernel": {"shape": "heads of", "keys": "keys", "rows": "rows", "kernel_ms": "kernel (ms)", "sdpa_ms": "sdpa, blocks of rows (ms)", "full_ms": "sdpa, all rows (ms)"},
    "copy": {"memory": "host memory", "gb_s": "GB/s to the GPU"},
    "full": {"model": "model", "tokens": "prompt tokens", "seconds": "full prefill (s)", "encoding": "encoding the chunks (s)"},
    "first token": {"model": "model", "tokens": "prompt tokens", "place": "KV in", "recomputed": "recomputed", "not_loaded": "chunks not loaded", "seconds": "first token (s)", "times_faster": "times faster", "bound": "bound"},
    "loading": {"model": "model", "tokens": "prompt tokens", "bytes_a_token": "bytes a token", "computing_us": "computing a token (µs)", "copying_us": "copying it (µs)", "GPU_us": "placing it from the GPU (µs)", "host_us": "loading it from the host (µs)", "disk_us": "from disk (µs)"},
    "decoding": {"model": "model", "tokens": "prompt tokens", "streams": "streams", "tokens_s": "tokens a second", "generate_tokens_s": "transformers' generate"},
    "memory": {"model": "model", "tokens": "prompt tokens", "peak_gib": "peak with reuse (GiB)", "full_gib": "peak of full prefill (GiB)"},
    "left out": {"what": "left out for lack of time"},
}  # fmt: skip


def tables(rows: Sequence[Row]) -> Iterator[str]:
    for section, columns in TABLES.items():
        mine = [row for row in rows if row["section"] == section]
        if not mine:
            continue
        yield f"\n| {' | '.join(columns.values())} |"
        yield "|---" * len(columns) + "|"
        for row in mine:
            yield f"| {' | '.join(shown(row.get(column)) for column in columns)} |"


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models and short prompts")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing that would end later")
    parser.add_argument("--models", nargs="*", default=[], help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA GPU here; --device cpu --small tries the script")
    if device.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
    run = Run(device, args.small, args.minutes, args.out, args.repeats)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    import transformers

    run.add("machine", device=where, torch=torch.__version__, transformers=transformers.__version__)
    kernel(run)
    rate = copies(run)
    default_device(run)
    models(run, rate, args.models)
    print(f"{where}, torch {torch.__version__}, {time.monotonic() - run.begun:.0f} s")
    print(*tables(run.rows), sep="\n")
    failed = [row["what"] for row in run.rows if row["section"] == "check" and not row["passed"]]
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
