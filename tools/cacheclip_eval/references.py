"""Cached answers of full prefill: the references that every system is compared with."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from cacheclip_rag.engine import Engine
from cacheclip_rag.prefill.result import Prefill
from cacheclip_rag.report import Report
from cacheclip_rag.store import files

log = logging.getLogger("cacheclip_rag")

ANSWER_TOKENS = 24
"""The maximum number of answer tokens that the KL is averaged over."""

FORMAT = "cacheclip-rag reference/1"


@dataclass(frozen=True, eq=False)
class Reference:
    """Full prefill of one prompt: its greedy ``answer``, the bfloat16 ``logits [n, V]`` of the answer's first n tokens
    (at most `ANSWER_TOKENS`), and the numbers of its report (`measured`), with the right answer's
    likelihood.
    """

    answer: tuple[int, ...]
    logits: Tensor
    numbers: dict[str, Any]


class References:
    """A folder of references: one file (2 V bytes per answer token) per model, prompt and ``max_new_tokens``.

    A damaged file or a full disk raises nothing: the reference is computed again.
    """

    def __init__(self, folder: str | Path, model: str, max_new_tokens: int) -> None:
        self._folder, self._model, self._length = Path(folder), model, max_new_tokens

    def of(self, engine: Engine, prompt: str, right: Tensor | None = None) -> Reference:
        """The cached reference, or a new one, with the likelihood of the ``right`` answer ``[A]`` if there is one.
        Raises what `Engine.prefill` raises.
        """
        kept = self.get(prompt)
        lacking = right is not None and len(right) > 0 and kept is not None and kept.numbers.get("nll") is None
        if kept is None or lacking:
            kept = compute(engine, prompt, self._length, right)
            self.put(prompt, kept)
        return kept

    def path(self, prompt: str) -> Path:
        return self._folder / f"{self._model}-{digest(prompt)}-{self._length}.safetensors"

    def get(self, prompt: str) -> Reference | None:
        path = self.path(prompt)
        try:
            return self._load(bytes(files.read(path)), prompt)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            log.warning("reference %s is computed again: %s: %s", path.name, type(error).__name__, error)
            return None

    def put(self, prompt: str, reference: Reference) -> None:
        tensors = {"answer": torch.tensor(reference.answer), "logits": reference.logits.cpu().contiguous()}
        about = self._about(prompt) | {"numbers": json.dumps(reference.numbers)}
        data = safetensors.torch.save(tensors, {**about, "checksum": _checksum(tensors, about)})
        try:
            files.make_directory(self._folder)
            files.publish(self.path(prompt), data)
        except OSError as error:
            log.warning("reference not kept: %s", error)

    def _load(self, data: bytes, prompt: str) -> Reference:
        """The reference in ``data``. Raises unless it is, bit for bit, what `put` wrote for this prompt."""
        length = int.from_bytes(data[:8], "little")
        about = json.loads(data[8 : 8 + length])["__metadata__"]
        tensors = safetensors.torch.load(data)
        if about.pop("checksum") != _checksum(tensors, about):
            raise ValueError("checksum")
        if {name: about.get(name) for name in self._about(prompt)} != self._about(prompt):
            raise ValueError("it belongs to something else")
        return Reference(tuple(tensors["answer"].tolist()), tensors["logits"], json.loads(about["numbers"]))

    def _about(self, prompt: str) -> dict[str, str]:
        return {
            "format": FORMAT,
            "model": self._model,
            "prompt": digest(prompt),
            "max_new_tokens": str(self._length),
            "answer_tokens": str(ANSWER_TOKENS),
        }


def digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


def compute(engine: Engine, prompt: str, max_new_tokens: int, right: Tensor | None = None) -> Reference:
    """Full prefill and greedy decoding, with the logits of the answer's first tokens."""
    room = max(max_new_tokens, 0 if right is None else len(right)) + 1
    full = engine.prefill(prompt, method="full", room=room)
    nll = None if right is None else likelihood(full, right)
    seen = [full.logits]

    def step(token: Tensor, row: int) -> Tensor:
        logits = full.step(token, row)
        if len(seen) < ANSWER_TOKENS:
            seen.append(logits)
        return logits

    answer = tuple(
        engine.backbone.generate(full.layout.ids, full.logits, step, max_new_tokens=max_new_tokens, do_sample=False)
    )
    return Reference(answer, torch.cat(seen)[: len(answer)].bfloat16().cpu(), {**measured(full.report), "nll": nll})


def likelihood(prefill: Prefill, right: Tensor) -> float | None:
    """The mean negative log-likelihood in nats per token of the ``right`` answer ``[A]``; None of an empty one."""
    if not len(right):
        return None
    return float(torch.nn.functional.cross_entropy(prefill.forced(right.tolist()).float().cpu(), right))


def measured(report: Report) -> dict[str, Any]:
    """The fields of a row that come from a report. ``ratio`` is None if no stored KV was placed."""
    return {
        "ratio": report.ratio if report.reused + report.recomputed else None,
        "prompt_tokens": report.prompt_tokens,
        "prefix": report.prefix,
        "reused": report.reused,
        "recomputed": report.recomputed,
        "computed": report.computed_tokens,
        "ttft": report.ttft,
        "seconds": report.seconds,
        "fallbacks": report.fallbacks,
    }


def _checksum(tensors: dict[str, Any], about: dict[str, str]) -> str:
    state = xxhash.xxh3_128(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        state.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return state.hexdigest()
