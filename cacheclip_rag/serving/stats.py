"""Counters of an engine: requests, tokens, fallbacks, times to the first token and store statistics."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..report import Report
from ..store import StoreStats

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Upper bounds of the histogram buckets of `FirstToken`, in seconds; the last bucket has none."""


@dataclass(frozen=True)
class FirstToken:
    """A histogram of times to the first token: their number, their sum, and the count in each bucket of `SECONDS`."""

    count: int = 0
    seconds: float = 0.0
    classes: tuple[int, ...] = (0,) * (len(SECONDS) + 1)


KLS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Upper bounds of the histogram buckets of `AuditStats`, in nats; the last bucket has none."""


@dataclass(frozen=True)
class Audited:
    """One audit that has ended (see `prefill.audit`): a prompt was prefilled again in full.

    ``outcome``: the answer's likeliest first token is the ``same`` or ``changed``; or there was no comparison: the
    audit was ``dropped`` for want of idle time, its chunks were ``forgotten``, or it ``failed``. ``kl``: KL(full
    prefill || as answered) of the first token's distribution, in nats; None without a comparison.
    """

    method: str
    outcome: str
    kl: float | None = None


@dataclass(frozen=True)
class AuditStats:
    """Audits by outcome (see `Audited`), and a histogram of their KL: its sum in nats, and the count in each bucket of
    `KLS`.
    """

    same: int = 0
    changed: int = 0
    dropped: int = 0
    forgotten: int = 0
    failed: int = 0
    kl: float = 0.0
    classes: tuple[int, ...] = (0,) * (len(KLS) + 1)

    @property
    def compared(self) -> int:
        return self.same + self.changed

    @property
    def outcomes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("same", "changed", "dropped", "forgotten", "failed")}

    def with_one(self, audited: Audited) -> AuditStats:
        """These and one more."""
        more = replace(self, **{audited.outcome: getattr(self, audited.outcome) + 1})
        if audited.kl is None:
            return more
        return replace(more, kl=self.kl + audited.kl, classes=_count(self.classes, KLS, audited.kl))


@dataclass(frozen=True)
class Stats:
    """A snapshot of an engine. Counts are of requests that have ended, since the engine was opened.

    Prompt tokens are counted as in a `Report`: ``prompt_tokens = prefix + reused + recomputed + fresh``.
    """

    finished: dict[str, dict[str, int]] = field(default_factory=dict)
    """Requests by method and by finish reason (stop, length, cancelled, error)."""
    in_flight: int = 0
    """Requests being answered now, each with its prompt's KV in memory: more than ``max_requests`` if streams are left
    open."""
    waiting: int = 0
    """Requests waiting for one of ``max_requests`` in flight to end, or for all of them to be left unread."""
    prefix: int = 0
    reused: int = 0
    recomputed: int = 0
    fresh: int = 0
    completion_tokens: int = 0
    looked_up: int = 0
    """Tokens of answers that came by prompt lookup, without a forward of their own."""
    chunks: int = 0
    """Known chunks in prompts, counted each time."""
    missing: int = 0
    """Those of them that were prefilled, because their KV was gone, damaged or not worth loading."""
    fallbacks: dict[str, int] = field(default_factory=dict)
    """How often reuse was given up: for a ``chunk``, by a ``full prefill`` after a failure or where reuse would take
    longer, by a ``plain prefill`` because the model's KV cannot be moved, or for ``escaped documents``."""
    first_token: dict[str, FirstToken] = field(default_factory=dict)
    """By method; requests without a first token are not counted."""
    audit: AuditStats = field(default_factory=AuditStats)
    """Prompts that were prefilled again in full (``Engine(..., audit=0.01)``)."""
    store: StoreStats = field(default_factory=StoreStats)
    """The sum over the chunk stores of all encodings in use; bytes include the auxiliary model's. Hits and misses count
    all look-ups, including those of ingestion."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes of KV in memory by kind: ``chunks``, ``preambles``, ``prefix caches``, ``harvested variants``. Together at
    most the engine's ``memory_bytes``."""

    @property
    def requests(self) -> int:
        return sum(sum(reasons.values()) for reasons in self.finished.values())

    @property
    def prompt_tokens(self) -> int:
        return self.cached_tokens + self.computed_tokens

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that went through the model."""
        return self.recomputed + self.fresh

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV came from cache."""
        return self.prefix + self.reused

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, derived numbers included."""
        names = ("requests", "prompt_tokens", "computed_tokens", "cached_tokens")
        return {name: getattr(self, name) for name in names} | asdict(self)


def kind(fallback: str) -> str:
    """The kind of a line of `Report.fallbacks`; see `Stats.fallbacks`."""
    what = fallback.partition(":")[0]
    return "chunk" if what.startswith("chunk ") else what


class Tally:
    """Adds up the reports of finished requests. Thread-safe."""

    def __init__(self) -> None:
        self._numbers: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._finished: dict[str, Counter[str]] = {}
        self._first_token: dict[str, FirstToken] = {}
        self._lock = threading.RLock()  # reentrant: streams that the garbage collector ends are counted, too

    def add(self, report: Report) -> None:
        """Count a request that has ended."""
        with self._lock:
            self._finished.setdefault(report.method, Counter())[report.finish_reason] += 1
            for name in ("prefix", "reused", "recomputed", "fresh", "completion_tokens", "looked_up"):
                self._numbers[name] += getattr(report, name)
            self._numbers["chunks"] += len(report.chunks)
            self._numbers["missing"] += sum(use.missing is not None for use in report.chunks)
            self._fallbacks.update(map(kind, report.fallbacks))
            if report.completion_tokens:
                known = self._first_token.get(report.method, FirstToken())
                self._first_token[report.method] = _with(known, report.ttft)

    def snapshot(
        self,
        in_flight: int,
        waiting: int,
        store: StoreStats,
        memory: dict[str, int],
        audit: AuditStats = AuditStats(),
    ) -> Stats:
        with self._lock:
            return Stats(
                finished={method: dict(reasons) for method, reasons in self._finished.items()},
                in_flight=in_flight,
                waiting=waiting,
                fallbacks=dict(self._fallbacks),
                first_token=dict(self._first_token),
                audit=audit,
                store=store,
                memory=memory,
                **self._numbers,
            )


def total(stores: Iterable[StoreStats], aside: Iterable[StoreStats] = ()) -> StoreStats:
    """The sum of the statistics of several stores; of those in ``aside`` only the bytes."""
    summed = StoreStats()
    numbers = [one.name for one in fields(StoreStats) if one.name != "rejected"]
    for stats in stores:
        for name in numbers:
            setattr(summed, name, getattr(summed, name) + getattr(stats, name))
        for reason, count in stats.rejected.items():
            summed.rejected[reason] = summed.rejected.get(reason, 0) + count
    for stats in aside:
        for name in ("nbytes", "memory_bytes", "disk_bytes"):
            setattr(summed, name, getattr(summed, name) + getattr(stats, name))
    return summed


def _with(known: FirstToken, seconds: float) -> FirstToken:
    return FirstToken(known.count + 1, known.seconds + seconds, _count(known.classes, SECONDS, seconds))


def _count(classes: tuple[int, ...], bounds: tuple[float, ...], value: float) -> tuple[int, ...]:
    """The counts of a histogram's buckets with one value more."""
    at = bisect_left(bounds, value)
    return (*classes[:at], classes[at] + 1, *classes[at + 1 :])
