"""OpenVINO GenAI's continuous batching pipeline with its prefix cache on, over weights that optimum-intel converted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import openvino_genai
from asked import Asked, by_steps


def converted(model: str, weights: str) -> Path:
    """The folder with the model's weights for OpenVINO ("fp16", "int8" or "int4"), made if it is not there.

    It lies in this environment, under the model's name.
    """
    folder = Path(sys.prefix) / "models" / f"{Path(model).name}-{weights}"
    if not (folder / "openvino_model.xml").is_file():
        partial = folder.with_suffix(".partial")
        command = [Path(sys.executable).with_name("optimum-cli"), "export", "openvino", "--model", model]
        command += ["--task", "text-generation-with-past", "--weight-format", weights, partial]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "Error" in line] or ["no message"]
            raise SystemExit(f"optimum-intel could not convert the weights to {weights}: {lines[-1]}")
        partial.rename(folder)
    return folder


def load(model: str, options: dict[str, Any], threads: int) -> Any:
    """``options``: "weights", and under "properties" those of the pipeline."""
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 2, True
    properties = {"INFERENCE_NUM_THREADS": threads, **options.get("properties", {})}
    folder = converted(model, options["weights"])
    return openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties), options


def ingest(system: Any, passages: list[str]) -> None:
    pass


def ask(system: Any, prompts: list[str], users: int, tokens: int) -> list[Asked]:
    pipeline, options = system
    greedy = openvino_genai.GenerationConfig(
        do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, **options.get("generation", {})
    )
    handles: dict[int, Any] = {}
    ids: dict[int, list[int]] = {}

    def add(number: int, prompt: str) -> None:
        handles[number], ids[number] = pipeline.add_request(number, prompt, greedy), []

    def step() -> Iterable[tuple[int, int, str | None]]:
        pipeline.step()
        for number, handle in list(handles.items()):
            new = False
            while handle.can_read():
                (output,) = handle.read().values()
                ids[number] += output.generated_ids
                new = True
            done = handle.get_status() != openvino_genai.GenerationStatus.RUNNING
            if done:
                del handles[number]
            if new or done:
                text = pipeline.get_tokenizer().decode(ids[number]) if done else None
                yield number, len(ids[number]), text

    return by_steps(prompts, users, add, step)
