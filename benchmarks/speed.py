"""Time to first token against full prefill, with quality: medians of paired runs in one process.

    python benchmarks/speed.py --model qwen2.5-coder-0.5b-instruct --tokens 2000 6000

Every pair runs transformers' own full prefill (sdpa) and the engine on the same prompt, with the same weights in
memory, one right after the other, in alternating order. The engine's time includes everything: recognition,
tokenisation, loading, placing, selection, recompute. Prompts contain ten chunks of the shipped PEPs, or as many as keep
them below 600 tokens each, and are new each time, so that only chunk KV and the template's preamble can be reused. Long
contexts: ``--tokens 6000 16000 30000 --methods auto --pairs 1``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import torch

from cacheclip_rag import Engine
from cacheclip_rag.methods import resolve
from cacheclip_rag.report import Report
from cacheclip_rag.store import MemoryStore, TieredStore
from cacheclip_rag.verification import kl

CORPUS = Path(__file__).parent.parent / "examples" / "demo" / "corpus"
CHUNKS = 10
LONGEST = 600  # tokens of a chunk: few of the texts have more to choose from
STAGES = ("recognise", "tokenise", "select", "load", "place", "recompute")


def chunks_of(engine: Engine, tokens: int, generator: random.Random) -> list[str]:
    """Pieces of the documents, together about ``tokens`` tokens: ten, or more of at most `LONGEST` tokens."""
    count = max(CHUNKS, -(-tokens // LONGEST))
    size, chosen = tokens // count, []
    files = sorted(CORPUS.glob("*.txt"))
    while len(chosen) < count:
        text = generator.choice(files).read_text(encoding="utf-8")
        offsets = engine.backbone.tokenise(text).offsets
        if len(offsets) <= size + 1:
            continue
        start = generator.randrange(len(offsets) - size)
        chosen.append(text[offsets[start, 0] : offsets[start + size, 0]].strip())
    return chosen


def prompt_of(engine: Engine, chunks: list[str], question: str) -> str:
    content = (
        "Context information is below.\n---------------------\n"
        + "\n\n".join(chunks)
        + "\n---------------------\nGiven the context information and not prior knowledge, answer the query.\n"
        f"Query: {question}\nAnswer: "
    )
    return engine.backbone.chat([{"role": "user", "content": content}])


@torch.inference_mode()
def baseline(engine: Engine, prompt: str) -> tuple[float, torch.Tensor]:
    """Seconds from the prompt's text to the first token of transformers' own full prefill, and its logits."""
    model, tokenizer = engine.backbone.model, engine.backbone.tokenizer
    model.set_attn_implementation("sdpa")
    try:
        start = time.perf_counter()
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(engine.backbone.device)
        logits = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0].float()
        int(logits.argmax())
        return time.perf_counter() - start, logits
    finally:
        model.set_attn_implementation(engine.backbone.attention)


def drop_page_cache(folder: Path) -> None:
    """Drop these files from the operating system's page cache, so that loading them reads the disk."""
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def forget_memory(engine: Engine) -> None:
    for library in (engine.library, engine.auxiliary.library if engine.auxiliary else None):
        if library is not None:
            library.store = TieredStore(MemoryStore(4 << 30), library.store.tiers[1])


def first_token(engine: Engine, prompt: str, question: str, method: str, ratio: float | None) -> Report:
    return engine.generate(prompt, question=question, method=method, recompute_ratio=ratio, max_new_tokens=1).report


def fuse(engine: Engine, chunks: list[str], method: str) -> None:
    """For methods with fused variants: fuse the chunks as in an earlier prompt with the second half first."""
    if resolve(method).fit is not None:
        half = len(chunks) // 2
        engine.fuse_in_order([[*chunks[half:], *chunks[:half]]], method=method)


def pair(
    engine: Engine, chunks: list[str], question: str, method: str, ratio: float | None, order: int, folder: Path
) -> dict:
    """Measure one prompt: full prefill, reuse with KV in memory, reuse with KV on disk, and the agreement of logits."""
    engine.ensure(chunks)
    fuse(engine, chunks, method)
    prompt = prompt_of(engine, chunks, question)
    row: dict = {}
    for step in (0, 1) if order % 2 else (1, 0):
        if step:
            row["memory"] = first_token(engine, prompt, question, method, ratio)
        else:
            row["full"], oracle = baseline(engine, prompt)
    forget_memory(engine)
    drop_page_cache(folder)
    row["disk"] = first_token(engine, prompt, question, method, ratio)
    ours = engine.prefill(prompt, question=question, method=method, recompute_ratio=ratio).logits
    row["equal"] = int(ours.argmax()) == int(oracle.argmax())
    row["kl"] = kl(oracle, ours)
    row["kl naive"] = kl(oracle, engine.prefill(prompt, method="naive").logits)
    return row


def measure(engine: Engine, tokens: int, pairs: int, ratio: float, method: str, folder: Path) -> dict:
    own = ratio if resolve(method).fitted_ratio is None else None
    generator, rows = random.Random(tokens), []
    for number in range(pairs):
        question = f"What do passages {generator.randrange(90)} and {generator.randrange(90)} propose, and why?"
        rows.append(pair(engine, chunks_of(engine, tokens, generator), question, method, own, number, folder))
    memory, disk = [row["memory"] for row in rows], [row["disk"] for row in rows]
    breakdown = {stage: median(r.seconds.get(stage, 0.0) for r in memory) for stage in STAGES}
    breakdown["first token"] = median(r.ttft - sum(r.seconds.values()) for r in memory)
    return {
        "method": method,
        "prompt tokens": median(r.prompt_tokens for r in memory),
        "ratio": round(median(r.ratio for r in memory), 3),
        "full prefill (s)": round(median(row["full"] for row in rows), 2),
        "times faster, KV in memory": round(median(row["full"] / row["memory"].ttft for row in rows), 2),
        "times faster, KV on disk": round(median(row["full"] / row["disk"].ttft for row in rows), 2),
        "bound": round(median(r.bound for r in memory), 2),
        "first tokens equal": f"{sum(row['equal'] for row in rows)}/{len(rows)}",
        "KL of the first token": round(median(row["kl"] for row in rows), 4),
        "KL of naive reuse": round(median(row["kl naive"] for row in rows), 4),
        "breakdown (s)": {stage: round(seconds, 3) for stage, seconds in breakdown.items()},
        "pages of the report (s)": round(median(seconds_of_pages(r) for r in memory), 3),
        "load from disk (s)": round(median(r.seconds.get("load", 0.0) for r in disk), 3),
    }


def seconds_of_pages(report: Report) -> float:
    """Seconds to write a report as text and as HTML."""
    start = time.perf_counter()
    str(report), report._repr_html_(), report.as_dict()
    return time.perf_counter() - start


def encoding_cost(engine: Engine, pairs: int = 7) -> float:
    """Seconds to encode a chunk of 512 tokens over seconds of a plain transformers forward of the same tokens."""
    generator, ratios = random.Random(1), []
    for _ in range(pairs + 1):
        text = chunks_of(engine, 5120, generator)[0]
        ids = engine.backbone.tokenise(text).ids[None].to(engine.backbone.device)
        start = time.perf_counter()
        engine.library.encode(text)
        middle = time.perf_counter()
        engine.backbone.model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            engine.backbone.model.base_model(input_ids=ids, use_cache=True)
        engine.backbone.model.set_attn_implementation(engine.backbone.attention)
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return median(ratios[1:])


def peak_memory(engine: Engine, tokens: int) -> dict:
    """The resident memory that a request adds at its peak, and its canvas."""
    chunks = chunks_of(engine, tokens, random.Random(2))
    engine.ensure(chunks)
    prompt = prompt_of(engine, chunks, "What is proposed?")
    page, peak, stop = os.sysconf("SC_PAGESIZE"), [0], threading.Event()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], resident())

    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    report = engine.prefill(prompt).report
    stop.set()
    watcher.join()
    return {
        "prompt tokens": report.prompt_tokens,
        "recomputed and fresh rows": report.computed_tokens,
        "canvas (MiB)": report.canvas_bytes >> 20,
        "peak added (MiB)": (peak[0] - before) >> 20,
    }


def tell(result: dict, out: Path | None) -> None:
    print(json.dumps(result, indent=2), flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps(result) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="*", default=["qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"])
    parser.add_argument("--auxiliary", default="smollm2-135m-instruct")
    parser.add_argument("--methods", nargs="*", default=["cacheclip", "query_guided"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[2000, 6000])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--out", type=Path, help="append the results to this JSONL file as well")
    args = parser.parse_args()
    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"machine: {machine}")
    for name in args.model:
        with tempfile.TemporaryDirectory() as folder:
            engine = Engine(name, auxiliary=args.auxiliary, store=folder)
            common = {"model": name, "dtype": str(engine.backbone.dtype), "machine": machine, "r": args.ratio}
            measure(engine, 1000, 1, args.ratio, args.methods[0], Path(folder))  # warms everything up
            for tokens in args.tokens:
                for method in args.methods:
                    tell({**common, **measure(engine, tokens, args.pairs, args.ratio, method, Path(folder))}, args.out)
            tell({**common, "encoding / plain forward": round(encoding_cost(engine), 2)}, args.out)
            tell({**common, **peak_memory(engine, max(8000, *args.tokens))}, args.out)


if __name__ == "__main__":
    main()
