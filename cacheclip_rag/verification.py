"""Checks that KV reuse is correct for a model on this machine, against the model's own full prefill."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import methods
from .chunks import ChunkKV
from .engine import Engine
from .model.backbone import Backbone
from .prefill.result import Prefill, PrefillRequest
from .report import Report
from .store import DiskStore
from .weights import verified

RATIO = 0.15
"""The recompute ratio between 0 and 1 that is checked."""
_ANSWER = 16  # tokens of full prefill's own answer that are compared
_ROUNDING = {torch.float32: 0.01, torch.float64: 0.01}
"""Relative errors that rounding explains; 0.1 for 16-bit dtypes. A wrong computation gives an error of order 1."""

PASSAGES = (
    "The observatory on Tamsin Fell was finished in 1931. Its first director, Ines Halvorsen, had the dome turned by "
    "two mules until the electric line came up from Corrie in 1938; the harness still hangs in the entrance hall.",
    "Ines Halvorsen was trained as a watchmaker in Besançon. She ground the main mirror herself, over fourteen months, "
    "and wrote down every stroke in three green notebooks that are kept in the library of Corrie.",
    "Corrie is a town of nine thousand people on the river Aune. Its library burned down in 1952, and only the reading "
    "room with its iron gallery could be saved; what was on loan that week came through, the green notebooks among it.",
    "The river Aune is dammed above Corrie since 1964. The engineer of the dam, Pavel Okonkwo, moved the old toll "
    "bridge stone by stone to the new road, where it carries the cycle path to Tamsin Fell today.",
    "Pavel Okonkwo collected sundials. Forty of them stand in the park behind the dam's power house, and one, the "
    "smallest, on the balcony of the observatory, where it has been eleven minutes slow since a repair in 1971.",
)
QUESTION = "Who ground the mirror of the observatory, and where are the notes about it?"


@dataclass(frozen=True)
class Check:
    """One measurement: passed when ``found`` is at most ``limit``."""

    name: str
    found: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.found <= self.limit  # False for NaN


@dataclass(frozen=True)
class Verification:
    """The result of `verify`. ``identity``: the model, machine and libraries it holds for; ``obstacle``: why chunks
    cannot be composed with this model at all, or None.
    """

    identity: dict[str, str]
    checks: tuple[Check, ...]
    obstacle: str | None = None

    @property
    def trusted(self) -> bool:
        return self.obstacle is None and bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def line(self) -> str:
        """The verdict in one line."""
        if self.trusted:
            return f"may be trusted with reuse: {len(self.checks)} checks passed"
        if self.obstacle is not None:
            return f"must not be trusted with reuse: {self.obstacle}"
        failed = [
            f"{check.name} ({check.found:.2g}, limit {check.limit:.2g})" for check in self.checks if not check.passed
        ]
        return f"must not be trusted with reuse: {'; '.join(failed)}"

    @property
    def record(self) -> dict[str, Any]:
        """For `verified.write` and for printing, JSON-like."""
        checks = [asdict(check) | {"passed": check.passed} for check in self.checks]
        return {"trusted": self.trusted, "line": self.line, "checks": checks}


def verify(backbone: Backbone, store: str | Path | None = None) -> Verification:
    """Check reuse with a model. ``store``: the folder that the canary chunk is written to and stays in; None takes a
    temporary one.

    Everything is compared with transformers' own eager attention, on the tokens of full prefill's answer. The backbone
    must not answer requests meanwhile. Raises `StoreError`, and `PromptError` for a context length of a few hundred
    tokens.
    """
    if backbone.obstacle is not None:
        return Verification({}, (), backbone.obstacle)
    with tempfile.TemporaryDirectory() as temporary, Engine(backbone, method="naive") as engine:
        engine.ensure(PASSAGES)
        checks = [*_golden(engine), _moved(engine), *_canary(backbone, store or temporary)]
        return Verification(verified.identity(engine.library.namespace.fields, backbone), tuple(checks))


def _golden(engine: Engine) -> list[Check]:
    """Checks full prefill, and reuse at the ratios 1, 0 and `RATIO`, against the model's own logits."""
    backbone, limit = engine.backbone, _limit(engine.backbone)
    prompt = _chat(backbone, PASSAGES)
    full = engine.prefill(prompt, method="full", room=_ANSWER + 1)
    answer = torch.tensor(
        list(backbone.generate(full.layout.ids, full.logits, full.step, max_new_tokens=_ANSWER, do_sample=False))
    )
    own = _own(backbone, full, answer)
    checks = [Check("full prefill is the model's own", _error(full.forced(answer.tolist()), own), limit)]

    # An engine answers ratio 1 by full prefill; here all goes the way of reuse, and everything placed is recomputed.
    report = Report("query_guided", 1.0)
    request = PrefillRequest(prompt, methods.resolve("query_guided"), 1.0, _ANSWER + 1)
    redone = engine.prefiller.strategies["compose"](request, engine.prefiller.read(request, report), report)
    error = _error(redone.forced(answer.tolist()), own) if report.recomputed and not report.reused else float("inf")
    checks.append(Check("reuse at ratio 1 is full prefill", error, limit))

    first = f"{backbone.shared_prefix()}{PASSAGES[0]}\n\n{QUESTION}"
    alone = engine.prefill(first, method="naive", room=2)
    golden = _own(backbone, alone, torch.tensor([0]))
    error = _error(alone.logits, golden) if alone.report.reused else float("inf")
    checks.append(Check("reuse at ratio 0 of a chunk in place is full prefill", error, limit))

    blind = engine.prefill(_chat(backbone, ()), method="full", room=_ANSWER + 1)
    unread = kl(own, blind.forced(answer.tolist()))
    for ratio in (0.0, RATIO):
        reused = engine.prefill(prompt, method="query_guided", recompute_ratio=ratio, room=_ANSWER + 1)
        divergence = kl(own, reused.forced(answer.tolist())) if reused.report.reused else float("inf")
        checks.append(
            Check(f"KL at ratio {ratio:g}, at most that of an answer without the documents", divergence, unread)
        )
    return checks


def _moved(engine: Engine) -> Check:
    """Checks a chunk's keys, moved to a distant position, against the keys that the model computes there."""
    backbone, library = engine.backbone, engine.library
    chunk = library.ensure(PASSAGES[0])
    distance = min(2000, backbone.context_length // 2)
    ids = torch.cat([library.prefix_ids, chunk.ids])
    placed, computed = backbone.canvas(len(ids)), backbone.canvas(len(ids))
    backbone.forward(ids, torch.arange(len(ids)), computed, positions=torch.arange(len(ids)) + distance, logits=0)
    start = len(library.prefix_ids)
    placed.place(chunk, slice(0, len(chunk)), start, start + distance)
    errors = [
        _error(placed.keys[layer, 0, :, start:], computed.keys[layer, 0, :, start:]) for layer in range(backbone.layers)
    ]
    return Check(f"keys moved by {distance} tokens are those computed there", max(errors), _limit(backbone))


def _canary(backbone: Backbone, folder: str | Path) -> list[Check]:
    """Checks a chunk's way through the files: one that an earlier verification left, and a new one, bit for bit."""
    checks, prompt = [], _chat(backbone, PASSAGES[:1])
    with Engine(backbone, method="naive", store=folder) as engine:
        library = engine.library
        key = library.key(PASSAGES[0])
        fresh, left = library.encode(PASSAGES[0]), library.get(key)
        if left is not None:
            error = max(_error(left.keys, fresh.keys), _error(left.values, fresh.values))
            checks.append(
                Check("the canary of an earlier verification is what is computed today", error, _limit(backbone))
            )
        library.store.delete([key])
        library.store.put(key, fresh)
        engine.ensure(PASSAGES[:1])
        before = engine.prefill(prompt, method="naive").logits
        back = DiskStore(folder, library.namespace, 1 << 40).get(key)
        checks.append(Check("a stored chunk comes back bit for bit", _different(fresh, back), 0))
    with Engine(backbone, method="naive", store=folder) as engine:  # a new engine, with nothing in memory
        after = engine.prefill(prompt, method="naive")
        error = _error(after.logits, before) if after.report.reused else float("inf")
        checks.append(Check("reuse of what was stored is reuse of what was computed", error, _limit(backbone)))
    return checks


def kl(reference: Tensor, other: Tensor) -> float:
    """Mean over positions of KL(reference || other) in nats, from logits ``[n, V]``.

    Teacher-forced on full prefill's own answer, it separates methods on a handful of items, where F1 cannot.
    """
    p, q = reference.float().log_softmax(dim=-1), other.float().log_softmax(dim=-1)
    return float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))


def _chat(backbone: Backbone, passages: Sequence[str]) -> str:
    return backbone.chat([{"role": "user", "content": "\n\n".join(["Documents:", *passages, QUESTION])}])


def _own(backbone: Backbone, prefill: Prefill, answer: Tensor) -> Tensor:
    """transformers' own logits ``[n, V]`` of the n answer tokens' positions."""
    return backbone.own_logits(torch.cat([prefill.layout.ids, answer[:-1]]), len(answer))


def _limit(backbone: Backbone) -> float:
    return _ROUNDING.get(backbone.dtype, 0.1)


def _error(one: Tensor, other: Tensor) -> float:
    """``|one - other| / |other|``; NaN if either is not finite."""
    one, other = one.float().cpu(), other.float().cpu()
    return float((one - other).norm() / other.norm().clamp_min(1e-12))


def _different(one: ChunkKV, other: ChunkKV | None) -> float:
    """How many bytes of two chunks differ."""
    if other is None or (one.text, one.position) != (other.text, other.position):
        return float("inf")
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("keys", "values", "ids", "offsets")]
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return float("inf")
    return float(sum(int((_bytes(a) != _bytes(b)).sum()) for a, b in pairs))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
