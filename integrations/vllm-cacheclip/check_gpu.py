"""Checks chunk reuse on this machine's GPU, and times it: backends, CUDA graphs and model runners of vLLM 0.32.

    python check_gpu.py                       # one CUDA GPU, vLLM 0.32, no network: some ten minutes
    python check_gpu.py --device cpu --small  # the same checks on a CPU, where there is one backend

Models are random and saved to a temporary folder; each setting has an engine, and so a process, of its own. Prints a
line for each check with its inputs, what is expected, what was found and the line of vLLM's source that it rests on;
``--json FILE`` takes them as rows. Exits with 1 if a check failed, with 2 if time ran out before all were made.

What counts as equal: in float32, the same greedy tokens. In bfloat16, passes of other sizes and compiled ones round
otherwise, so that greedy tokens of a random model part sooner or later. There the first token's distribution must be
plain vLLM's within `BOUND` nats, or four times the distance of plain vLLM alone from itself in a batch; and to show
that this can tell, reuse without repair must be further away than ten times that.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "tests")]

BOUND = 2e-3
"""KL in nats of the first token's distribution from plain vLLM's, in bfloat16. Some thirty times what bfloat16 itself
changes in this model (6e-5 against float32, in transformers), a twentieth of what reuse without repair does."""
ERROR = {"float32": 1e-4, "bfloat16": 5e-2}
"""Relative error of a layer's keys or values, by dtype, between rows computed as one run and as scattered ones.
A mask that lets a run see what follows it gives errors around 1."""
MINUTES = 10
LONGEST = 180
"""Seconds that one setting may take."""

RELIES: dict[str, tuple[str, str]] = {
    "FLASH_ATTN": ("v1/attention/backends/flash_attn.py", "seqused_k = attn_metadata.seq_lens"),
    "FLASHINFER": ("v1/attention/backends/flashinfer.py", "decode_threshold=self.reorder_batch_threshold"),
    "TRITON_ATTN": ("v1/attention/ops/triton_unified_attention.py", "context_len = seq_len - cur_batch_query_len"),
    "CPU_ATTN": ("v1/attention/backends/cpu_attn.py", "causal=causal,"),
    "graphs": ("compilation/decorators.py", "get_forward_context().skip_compiled"),
    "runner V1": ("v1/worker/kv_connector_model_runner_mixin.py", "not scheduler_output.has_sync_kv_loads"),
    "runner V2": ("v1/worker/gpu/kv_connector.py", "if scheduler_output.has_sync_kv_loads"),
    "tensor parallel": ("distributed/parallel_state.py", "def all_reduce(self, input_"),
    "prefix cache": ("v1/request.py", "def update_block_hashes"),
    "matched": ("v1/core/sched/scheduler.py", "has_sync_kv_loads = True"),
}
"""What reuse rests on, for each part of a setting: a file of vLLM's, and a piece of the line."""

Row = dict[str, Any]


# ---- in the process of a setting -------------------------------------------------------------------------------------


def wide(**more: Any) -> Any:
    """A tiny model with heads of 64, the smallest that all backends take. Its weights are narrow: wide ones, as in the
    float32 tests, make differences of rounding as large as those of reuse.
    """
    from serving import SHAPE_HERE
    from transformers import LlamaConfig

    return LlamaConfig(**{**SHAPE_HERE, "head_dim": 64, "hidden_size": 256, "initializer_range": 0.06, **more})


def qwen(small: bool) -> Any:
    """The shape of Qwen2.5-1.5B; two narrow layers of it if ``small``."""
    from transformers import Qwen2Config

    shape: dict[str, Any] = dict(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        eos_token_id=257,
        bos_token_id=None,
    )
    if small:
        shape |= dict(vocab_size=260, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
        shape |= dict(num_attention_heads=4, num_key_value_heads=2)
    return Qwen2Config(**shape)


def save(folder: Path, config: Any, dtype: str) -> Path:
    """A random model of this shape with a byte tokenizer, saved to ``folder``."""
    import torch
    from serving import byte_tokenizer
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def answers(served: Any, jobs: Sequence[tuple[list[int], dict[str, Any]]], tokens: int = 8) -> list[Any]:
    """Of each job, all at once: its greedy tokens, its report, and the first token's log probabilities ``[V]``."""
    import torch
    from cacheclip_vllm.plan import FIELD
    from serving import asking

    params = [asking(options, max_tokens=tokens, logprobs=-1) for _, options in jobs]
    outputs = served.llm.generate([{"prompt_token_ids": ids} for ids, _ in jobs], params, use_tqdm=False)
    found = []
    for output in outputs:
        first = output.outputs[0].logprobs[0]
        logprobs = torch.tensor([first[token].logprob for token in range(len(first))])
        found.append((list(output.outputs[0].token_ids), (output.kv_transfer_params or {}).get(FIELD, {}), logprobs))
    return found


def apart(expected: Sequence[Any], got: Sequence[Any]) -> float:
    """The largest KL in nats of the first token's distribution, over these answers."""
    return max(
        float((one[2].exp() * (one[2] - other[2])).nan_to_num().sum()) for one, other in zip(expected, got, strict=True)
    )


def one_by_one(served: Any, jobs: Sequence[tuple[list[int], dict[str, Any]]]) -> list[Any]:
    return [answers(served, [job])[0] for job in jobs]


def scattered(count: int = 600, runs: int = 60) -> dict[str, float]:
    """The largest relative error of a layer's keys or values: of ``count`` rows computed in one pass as two sets of
    scattered runs, and of one set computed again, each against all of them as one run. On blocks that no request has.
    """
    import torch
    from cacheclip_vllm.computer import Keep, PagedWorkspace, run_forward
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from cacheclip_rag.compute import Part

    filler: Any = get_kv_transfer_group()._filler  # the worker is in this process
    model, generator = filler.model, torch.Generator().manual_seed(0)
    ids, rows = torch.randint(3, 250, (count,), generator=generator), torch.arange(count)
    cuts = torch.randperm(count - 1, generator=generator)[:runs].sort().values + 1
    side = torch.bucketize(rows, cuts, right=True) % 2
    size = -(-count // model.block_size)

    def workspace(first: int) -> Any:
        return PagedWorkspace(model, filler.tables, torch.arange(first, first + size), 0, slice(None))

    def compute(*parts: tuple[Any, Any]) -> None:
        run_forward(model, [Part(over, ids[some], some, hooks=[Keep()]) for over, some in parts], None)

    def error(one: Any, other: Any, some: Any) -> float:
        pairs = ((one.keys, other.keys), (one.values, other.values))
        expected = [(a[layer, some].float(), b[layer, some].float()) for a, b in pairs for layer in range(len(a))]
        return max(float((a - b).norm() / a.norm()) for a, b in expected)

    with torch.inference_mode():
        whole, split, again = workspace(1), workspace(1 + size), workspace(1)
        compute((whole, rows))
        compute((split, rows[side == 0]), (split, rows[side == 1]))
        compute((again, rows[side == 0]))
        return {
            "two sets in one pass": error(whole, split, rows),
            "one set again": error(whole, again, rows[side == 0]),
        }


class Checks:
    """The lines of one setting; ``exact``: whether tokens must be the same, or the first token's distribution."""

    def __init__(self, exact: bool, noise: float) -> None:
        """``noise``: nats between plain vLLM alone and in a batch."""
        self.rows: list[Row] = []
        self.exact, self.noise, self.bound = exact, noise, max(BOUND, 4 * noise)

    def line(self, check: str, inputs: str, expected: str, found: str, passed: bool, relies: str = "") -> None:
        self.rows.append(
            {"check": check, "inputs": inputs, "expected": expected, "found": found, "passed": passed, "relies": relies}
        )

    def compare(self, check: str, inputs: str, what: str, one: list[Any], other: list[Any], relies: str) -> None:
        equal = sum(a[0] == b[0] for a, b in zip(one, other, strict=True))
        distance = apart(one, other)
        expected, passed = f"{what}: the same tokens", equal == len(one)
        if not self.exact:
            passed = distance <= self.bound
            expected = f"{what}: KL <= {self.bound:.1e} (plain with itself {self.noise:.1e})"
        self.line(check, inputs, expected, f"{equal}/{len(one)} equal, KL {distance:.1e}", passed, relies)


def check(setting: dict[str, Any]) -> list[Row]:
    """The checks of tests/setting.py under one setting."""
    from serving import PASSAGES, Served

    exact = setting["dtype"] == "float32"
    with tempfile.TemporaryDirectory() as folder:
        model = save(Path(folder) / "model", wide(), "float32")
        served = Served(model, Path(folder) / "store", dtype=setting["dtype"], **setting["options"])
        errors = scattered() if setting["options"].get("tensor_parallel_size", 1) == 1 else {}
        orders = [PASSAGES[k:] + PASSAGES[:k] for k in range(len(PASSAGES))]
        prompts = [served.prompt(order, head=head) for order in orders for head in ("", "Read.\n\n")]
        plain = [(ids, {"reuse": False}) for ids in prompts]
        expected = one_by_one(served, plain)
        checks = Checks(exact, 0.0 if exact else apart(expected, answers(served, plain)))
        for what, error in errors.items():
            limit = ERROR[setting["dtype"]]
            wanted = f"keys and values of one run, relative error <= {limit:.0e}"
            inputs = f"600 rows in 61 runs, {what}"
            checks.line("scattered rows", inputs, wanted, f"{error:.1e}", error <= limit, "backend")
        served.encode(PASSAGES)
        inputs = f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, 5 chunks"

        whole = answers(served, [(ids, {"recompute_ratio": 1.0}) for ids in prompts])
        checks.compare("everything recomputed", inputs + ", r = 1", "plain vLLM", expected, whole, "backend")
        reasons = sorted({str(reason) for _, report, _ in whole for reason in report.get("fallbacks", ["no report"])})
        checks.line("nothing given up", inputs, "no fallback", "; ".join(reasons) or "none", not reasons, "matched")

        far, least = (
            apart(expected, answers(served, [(ids, {"method": "naive"}) for ids in prompts])),
            10 * checks.bound,
        )
        checks.line("the bound can tell", inputs + ", r = 0", f"KL > {least:.1e}", f"{far:.1e}", far > least)

        single = [served.prompt([passage]) for passage in PASSAGES]
        alone = one_by_one(served, [(ids, {"reuse": False}) for ids in single])
        placed = answers(served, [(ids, {"method": "naive"}) for ids in single])
        checks.compare("a chunk behind its prefix", "5 prompts, 1 chunk, r = 0", "plain vLLM", alone, placed, "backend")

        kinds: list[dict[str, Any]] = [{}, {"reuse": False}, {"recompute_ratio": 1.0}, {"method": "naive"}]
        jobs = [(ids, kind) for ids in prompts for kind in kinds]
        random.Random(0).shuffle(jobs)
        each, together = one_by_one(served, jobs), answers(served, jobs)
        most = max(report["pass"]["requests"] for _, report, _ in together if "pass" in report)
        # Rounding may choose other rows, and then the answers are those of other rows.
        judged = [number for number, (_, kind) in enumerate(jobs) if kind or exact]
        one, other = [each[number] for number in judged], [together[number] for number in judged]
        what = f"{len(jobs)} requests, plain and at r = 0, auto, 1, up to {most} in a pass; {len(judged)} compared"
        checks.compare("together as alone", what, "each by itself", one, other, "backend")

        again = one_by_one(served, plain)
        what = f"{len(prompts)} plain prompts again"
        checks.compare("prefix cache unspoilt", what, "as before", expected, again, "prefix cache")
        fresh = [served.prompt(order, head="Another beginning. ") for order in orders]
        answers(served, [(ids, {"method": "naive"}) for ids in fresh])
        hits, what = max(served.cached(fresh, reuse=False)), f"{len(fresh)} prompts at r = 0, then plainly"
        wanted = f"under {served.block} tokens found"
        checks.line("no approximate block cached", what, wanted, str(hits), hits < served.block, "prefix cache")
        reports = [report for _, report, _ in answers(served, [(ids, {}) for ids in prompts])]
        moved = sum(report.get("tokens", {}).get("adjusted", 0) for report in reports)
        wanted = "some tokens adjusted"
        checks.line("chunks are reused", f"{len(prompts)} prompts, auto", wanted, f"{moved:,}", moved > 0, "matched")
    return checks.rows


def timing(setting: dict[str, Any]) -> list[Row]:
    """Seconds to the first token, plainly and at r = 0.2, with a model of a real shape."""
    from serving import Served, asking

    small, chunk = setting["small"], 128 if setting["small"] else 512
    lengths = (1024, 2048) if small else (4096, 16384)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model = save(Path(folder) / "model", qwen(small), "bfloat16")
        options = dict(
            max_model_len=lengths[-1] + 512,
            max_num_batched_tokens=min(8192, lengths[-1]),
            kv_cache_memory_bytes=(1 << 28) if small else (4 << 30),
            max_logprobs=20,
        )
        served = Served(model, Path(folder) / "store", dtype="bfloat16", **options | setting["options"])
        words = [f"w{number:x}" for number in random.Random(1).sample(range(1 << 16), 4000)]
        texts = [" ".join(words[k::64] * 20)[:chunk] for k in range(lengths[-1] // chunk)]
        served.encode(texts)

        def first(ids: list[int], tokens: int = 1, **options: Any) -> tuple[float, Any]:
            start = time.perf_counter()
            [output] = served.llm.generate(
                [{"prompt_token_ids": ids}], asking(options, max_tokens=tokens), use_tqdm=False
            )
            return time.perf_counter() - start, output

        for length in lengths:
            passages = random.Random(length).sample(texts, length // chunk)
            kinds: list[dict[str, Any]] = [{"reuse": False}, {"recompute_ratio": 0.2}, {"recompute_ratio": 0.0}]
            times: list[list[float]] = [[], [], []]
            for turn in range(2 + (3 if small else 7)):
                for number, kind in enumerate(kinds):
                    # Each has a beginning of its own, so that vLLM's prefix cache has none of it.
                    ids = served.prompt(passages, head=f"{3 * turn + number}: question and notes of {length}.\n\n")
                    seconds, _ = first(ids, **kind)
                    if turn >= 2:  # what went before warms up
                        times[number].append(seconds)
            ids = served.prompt(passages, head="Once more.\n\n")
            report = first(ids, tokens=2, recompute_ratio=0.2)[1].kv_transfer_params["cacheclip"]
            tokens = report.get("tokens", {})
            computed = sum(tokens.get(source, 0) for source in ("recomputed", "fresh", "edge"))
            plain, reused, placed = (statistics.median(each) for each in times)
            found = (
                f"plain {1e3 * plain:.1f} ms; r = 0.2 {1e3 * reused:.1f} ms ({plain / reused:.2f}x, {computed:,} rows "
                f"computed, filling {1e3 * report.get('pass', {}).get('seconds', 0):.1f} ms); "
                f"r = 0 {1e3 * placed:.1f} ms ({plain / placed:.2f}x)"
            )
            rows.append(
                {
                    "check": f"time to first token, {length:,}",
                    "inputs": f"{len(ids):,} tokens, {length // chunk} chunks, medians of {len(times[0])}",
                    "expected": "chunks are reused; times are only measured",
                    "found": found,
                    "passed": not report.get("fallbacks") and bool(tokens.get("recomputed")),
                    "relies": "matched",
                    "seconds": {"plain": times[0], "0.2": times[1], "0": times[2]},
                }
            )
    return rows


# ---- the process that the user starts --------------------------------------------------------------------------------


def settings(device: str, small: bool, gpus: int) -> list[dict[str, Any]]:
    """All settings, the likeliest to be used first."""
    sizes = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}

    def one(name: str, kind: str, relies: list[str], dtype: str, environment: dict[str, str], **options: Any) -> Any:
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment}
        if device == "cuda":
            options.setdefault("gpu_memory_utilization", 0.5)
        parts = dict(name=name, kind=kind, relies=relies, dtype=dtype, environment=environment, small=small)
        return {**parts, "options": options}

    if device == "cpu":
        base = ["CPU_ATTN", "runner V1"]
        return [
            one("CPU, eager, float32", "check", base, "float32", {}),
            one("CPU, eager, bfloat16", "check", base, "bfloat16", {}),
            one("CPU, compiled, bfloat16", "check", [*base, "graphs"], "bfloat16", {}, enforce_eager=False),
            one("CPU, eager, 1.5B shape", "timing", base, "bfloat16", {}),
        ]
    found = []
    for graphs in (True, False):
        for runner in ("2", "1"):
            for backend in ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"):
                dtype = "float32" if backend == "TRITON_ATTN" else "bfloat16"  # the others have no float32
                more = {"compilation_config": sizes} if graphs else {}
                found.append(
                    one(
                        f"{backend}, {'graphs' if graphs else 'eager'}, runner V{runner}, {dtype}",
                        "check",
                        [backend, f"runner V{runner}", *(["graphs"] if graphs else [])],
                        dtype,
                        {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "2"))},
                        attention_backend=backend,
                        enforce_eager=not graphs,
                        **more,
                    )
                )
    times = [
        one(f"{backend}, graphs, 1.5B shape", "timing", [backend, "graphs"], "bfloat16", {}, **options)
        for backend in ("FLASH_ATTN", "FLASHINFER")
        for options in [dict(attention_backend=backend, enforce_eager=False, compilation_config=sizes)]
    ]
    ranks = (
        [
            one(
                "FLASH_ATTN, eager, two ranks, bfloat16",
                "check",
                ["FLASH_ATTN", "tensor parallel"],
                "bfloat16",
                {},
                attention_backend="FLASH_ATTN",
                tensor_parallel_size=2,
            )
        ]
        if gpus > 1
        else []
    )
    return [*found[:3], times[0], *ranks, *found[3:], *times[1:]]


def source_line(part: str) -> str:
    """Where vLLM's line is now, as ``file:line``, or that it is gone."""
    file, piece = RELIES[part]
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    text = (Path(spec.origin).parent / file).read_text(encoding="utf-8").splitlines()
    return next((f"{file}:{number}" for number, line in enumerate(text, 1) if piece in line), f"{file}: not found")


def run(setting: dict[str, Any], seconds: float) -> list[Row]:
    """The rows of one setting, from a process of its own."""
    command = [sys.executable, __file__, "--setting", json.dumps(setting)]
    environment = os.environ | setting["environment"]
    started, reason = time.perf_counter(), ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
        if done.returncode == 0:
            rows: list[Row] = json.loads(done.stdout.strip().splitlines()[-1])
        else:
            said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            reason, tail = (said or ["no output"])[-1], "\n".join(said[-40:])
    except subprocess.TimeoutExpired:
        reason, tail = f"not done after {seconds:.0f} s", ""
    if reason:
        rows = [{"check": "starts and ends", "inputs": setting["kind"], "expected": "rows", "found": reason}]
        rows[0] |= {"passed": False, "relies": "", "log": tail}
    for row in rows:
        parts = setting["relies"] if row["relies"] == "backend" else [row["relies"]] if row["relies"] else []
        row |= dict(setting=setting["name"], relies=[source_line(part) for part in parts])
    print(f"\n{setting['name']} ({time.perf_counter() - started:.0f} s)", flush=True)
    for row in rows:
        print(f"  {'ok    ' if row['passed'] else 'FAILED'} {row['check']}: {row['inputs']}")
        print(f"         expected {row['expected']}; found {row['found']}")
        if row["relies"]:
            print(f"         rests on vllm/{', vllm/'.join(row['relies'])}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a small model for the times")
    parser.add_argument("--only", default="", help="settings whose names hold this")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no setting is begun later")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, one a line")
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.setting:
        setting = json.loads(given.setting)
        print("\n" + json.dumps((check if setting["kind"] == "check" else timing)(setting)))
        return 0
    gpus = 0
    if given.device == "cuda":
        import torch

        gpus = torch.cuda.device_count()
        if not gpus:
            print("no CUDA GPU is visible: --device cpu --small runs the same checks on a CPU", file=sys.stderr)
            return 2
        print(", ".join(torch.cuda.get_device_name(number) for number in range(gpus)))
    rows: list[Row] = []
    late = []
    end = time.monotonic() + 60 * given.minutes
    for setting in settings(given.device, given.small, gpus):
        if given.only not in setting["name"]:
            continue
        if (left := end - time.monotonic()) <= 0:
            late.append(setting["name"])
            continue
        rows += run(setting, min(LONGEST, left) if given.device == "cuda" else 3 * LONGEST)
    if given.json:
        given.json.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    failed = [row for row in rows if not row["passed"]]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} checks passed")
    for row in failed:
        print(f"FAILED {row['setting']}: {row['check']}: {row['found']}")
    for name in late:
        print(f"not run, since {given.minutes:g} minutes were over: {name}")
    return 1 if failed else 2 if late or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
