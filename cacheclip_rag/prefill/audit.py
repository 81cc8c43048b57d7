"""Quality in production: a share of the prompts is prefilled again in full, in idle time, and compared."""

from __future__ import annotations

import logging
import math
import random
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..background import Background
from ..compute import on_cpu
from ..errors import ConfigurationError
from ..interrupts import raised_by_signal
from ..kv.collections import Collections
from ..kv.encode import Encoder
from ..model.canvas import Canvas
from ..serving.limit import RequestLimit
from ..serving.lock import FairLock
from ..serving.stats import Audited, AuditStats
from .reading import Reading
from .result import Prefill, PrefillRequest

log = logging.getLogger("cacheclip_rag")

_PIECE = 256
"""Tokens that are computed at a time: a request that comes in meanwhile waits for no more."""
_WAIT = 60.0
"""Seconds that an audit waits for idle time before it is dropped."""


@dataclass(frozen=True)
class Audit:
    """What is audited: this ``share`` (0..1) of the prompts that reuse KV, chosen at random.

    ``limit``: the mean KL divergence, in nats, over ``window`` audited prompts above which a warning is logged, at most
    one a window. ``waiting``: how many may wait for idle time; more are dropped. Each takes 4 bytes a token of the
    prompt and 4 a token of the vocabulary. Raises `ConfigurationError` for numbers that make no sense.
    """

    share: float
    limit: float = 0.5
    window: int = 20
    waiting: int = 16

    def __post_init__(self) -> None:
        for name, low, high in (("share", 0, 1), ("limit", 0, math.inf), ("window", 1, math.inf), ("waiting", 1, 4096)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                what = "audit" if name == "share" else f"audit's {name}"
                upper = "" if high == math.inf else f" and at most {high}"
                hint = "; 0.01 audits one prompt in a hundred" if name == "share" else ""
                raise ConfigurationError(f"{what} is a number of at least {low}{upper}, not {value!r}{hint}")


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A prompt that is to be audited: its tokens ``ids [T]``, the log-probabilities ``[V]`` of its answer's first token
    as they were, and its chunks, by their names in the index. Nothing of its KV.
    """

    ids: Tensor
    logprobs: Tensor
    names: frozenset[str]
    method: str
    encode: Encoder


@dataclass(frozen=True, eq=False)
class _Ended:
    """An audit that is over, for observers to be told of."""

    done: Audited


class Auditor:
    """Chooses prompts, prefills them again in full while no request is served, and counts what it finds. Thread-safe.

    ``chance()`` (0..1) decides on each prompt. ``observers`` are called with every `Audited`, on the thread that ends
    it; what they raise is logged.
    """

    def __init__(
        self,
        audit: Audit,
        collections: Collections,
        lock: FairLock,
        limit: RequestLimit,
        chance: Callable[[], float] | None = None,
    ) -> None:
        self.audit = audit
        self.chance = chance or random.Random().random  # the application's own random numbers are not disturbed
        self.observers: list[Callable[[Audited], None]] = []
        self._collections, self._lock, self._limit = collections, lock, limit
        self._background: Background[_Waiting | _Ended] = Background(self._run)
        self._changing = threading.Lock()
        self._stats = AuditStats()
        self._window: list[Audited] = []

    def prefilled(self, result: Prefill, request: PrefillRequest, reading: Reading) -> None:
        """Note a prompt, if it reused KV and is one of the share."""
        report, method = result.report, request.method
        if not report.cached_tokens or self.chance() >= self.audit.share:
            return
        names = frozenset(span.key for span in reading.spans)
        logprobs = result.logits[-1].float().log_softmax(dim=-1).cpu()
        task = _Waiting(reading.tokens.ids.to(torch.int32), logprobs, names, method.name, method.encode)
        with self._changing:  # `forget` comes after the index has lost the chunk
            known = all(name in self._collections.index for name in names)
            taken = known and self._background.waiting < self.audit.waiting
            if taken:
                self._background.add([task])
        if not taken:
            self._end(task, "dropped" if known else "forgotten")

    def forget(self, names: Collection[str]) -> None:
        """Drop the audits of prompts with these chunks, by the names that the index had for them.

        The caller may have the engine's lock, so that observers are told by the background thread.
        """
        ended = [_Ended(done) for done in self._drop(lambda task: not task.names.isdisjoint(names), "forgotten")]
        if self.observers:
            self._background.add(ended)

    def stats(self) -> AuditStats:
        with self._changing:
            return self._stats

    @property
    def waiting(self) -> int:
        """How many wait for idle time."""
        return self._background.waiting

    def flush(self) -> None:
        """Wait until none waits."""
        self._background.flush()

    def close(self) -> None:
        """Drop what waits. What is noted later is audited again."""
        for done in self._drop(lambda task: True, "dropped"):
            self._tell(done)
        self._background.close()

    def after_fork(self) -> None:
        """In a forked process: what waits is the parent's to audit."""
        self._background.after_fork()
        self._background.drop(lambda task: True)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _drop(self, unwanted: Callable[[_Waiting], bool], outcome: str) -> list[Audited]:
        gone: list[_Waiting] = []

        def drop(task: _Waiting | _Ended) -> bool:
            if isinstance(task, _Ended) or not unwanted(task):
                return False
            gone.append(task)
            return True

        with self._changing:
            self._background.drop(drop)
        return [self._count(task, outcome) for task in gone]

    @on_cpu
    def _run(self, task: _Waiting | _Ended) -> None:
        if isinstance(task, _Ended):
            self._tell(task.done)
            return
        try:
            logprobs = self._full(task)
        except Exception as error:
            if raised_by_signal(error):
                raise
            log.warning("an audit failed: %s: %s", type(error).__name__, error)
            self._over(task, "failed")
            return
        if logprobs is None:
            self._over(task, "dropped")
            return
        kl = float((logprobs.exp() * (logprobs - task.logprobs)).sum())
        if not math.isfinite(kl):
            self._over(task, "failed")
        else:
            same = int(logprobs.argmax()) == int(task.logprobs.argmax())
            self._over(task, "same" if same else "changed", max(0.0, kl))

    def _full(self, task: _Waiting) -> Tensor | None:
        """The log-probabilities ``[V]`` of the first token after a full prefill; None where there was no idle time, or
        nobody wants them any more.
        """
        backbone, ids = self._collections.backbone_of(task.encode), task.ids.long()
        canvas: Canvas | None = None  # its memory is taken when there is idle time
        for start in range(0, len(ids), _PIECE):
            if not self._limit.wait_for_rest(_WAIT, self._stopped) or self._stopped():
                return None
            rows = torch.arange(start, min(start + _PIECE, len(ids)))
            canvas = canvas or backbone.canvas(len(ids))
            with self._lock:
                logits = backbone.forward(ids[rows], rows, canvas)
        assert logits is not None
        return logits[-1].float().log_softmax(dim=-1).cpu()

    def _stopped(self) -> bool:
        """Whether the audit at hand was dropped, or somebody waits for it to end: the end of the process, too."""
        return not self._background.wanted() or self._background.ending()

    def _over(self, task: _Waiting, outcome: str, kl: float | None = None) -> None:
        """The audit at hand is over, unless somebody has dropped it: then that is what came of it."""
        with self._changing:
            wanted = self._background.wanted()
            self._background.drop(lambda other: other is task)
        if wanted:
            self._end(task, outcome, kl)

    def _end(self, task: _Waiting, outcome: str, kl: float | None = None) -> None:
        self._tell(self._count(task, outcome, kl))

    def _count(self, task: _Waiting, outcome: str, kl: float | None = None) -> Audited:
        done, window = Audited(task.method, outcome, kl), list[Audited]()
        with self._changing:
            self._stats = self._stats.with_one(done)
            self._window += [] if kl is None else [done]
            if len(self._window) >= self.audit.window:
                window, self._window = self._window, []
        if window and (mean := sum(one.kl or 0.0 for one in window) / len(window)) > self.audit.limit:
            log.warning(
                "answers differ from full prefill: a mean KL of %.2f nats over %d audited prompts (limit %.2f), and %d "
                "other first tokens; recompute more (recompute_ratio), or see docs/observability.md",
                mean,
                len(window),
                self.audit.limit,
                sum(one.outcome == "changed" for one in window),
            )
        return done

    def _tell(self, done: Audited) -> None:
        for observer in self.observers:
            try:
                observer(done)
            except Exception as error:  # as with those of requests
                if raised_by_signal(error):
                    raise
                log.exception("an observer of audits failed")
