"""Whether a chunk's KV is loaded or computed: what both cost on this machine, measured while it is done."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

_ENOUGH, _KEPT = 3, 9
"""Samples before anything is decided, and how many count: their median, so that one slow read changes nothing."""
_STEADY = 1.25
"""A rate changes when it differs by this factor, so that what is about as quick either way does not alternate."""
_SHORT = 0.02
"""Seconds of loading that are not worth a thought: what a busy machine takes more or less is as much."""
_AT_ONCE = 4
"""Loads that make a sample where there is always one under way."""
_FEW = 32
"""Tokens of a forward that takes nearly as long for one token, since it reads the weights: it is no sample."""
_PENDING = 8
"""Forwards on a GPU whose times are still to come, at most."""

DISK, REMOTE = "disk", "the remote"
"""The tiers from which loading costs something."""


class NotWorthLoading(Exception):
    """Computing the chunk is quicker than loading it; the message says by how much. It is stored and stays there."""


class Rate:
    """Seconds for one unit (a byte, a token); None until it was measured a few times."""

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=_KEPT)
        self.value: float | None = None

    def add(self, seconds: float, units: int) -> None:
        self._latest.append(seconds / units)
        if len(self._latest) >= _ENOUGH:
            now = median(self._latest)
            if not self.value or not 1 / _STEADY < now / self.value < _STEADY:
                self.value = now


@dataclass
class _Tier:
    """Loads from one tier. Parallel ones share its bandwidth, so time counts once while any of them is under way."""

    rate: Rate = field(default_factory=Rate)
    active: int = 0
    since: float = 0.0
    loads: int = 0
    nbytes: int = 0


class LoadingCost:
    """The seconds that loading a byte takes from each tier, and those that computing a token takes with one model.

    Memory costs nothing. Thread-safe.
    """

    def __init__(self) -> None:
        self._tiers: dict[str, _Tier] = {}
        self._computing = Rate()
        self._pending: deque[tuple[Any, Any, int]] = deque(maxlen=_PENDING)
        self._lock = threading.Lock()

    def why_computed(self, tier: str, nbytes: int, tokens: int) -> str | None:
        """Why ``tokens`` of a chunk had better be computed than its ``nbytes`` loaded from ``tier``; None if not.

        None as well while either was measured too rarely.
        """
        with self._lock:
            loading, computing = self._tiers.get(tier, _Tier()).rate.value, self._computing.value
        if loading is None or computing is None:
            return None
        load, compute = nbytes * loading, tokens * computing
        if load <= max(compute, _SHORT):
            return None
        return (
            f"loading it from {tier} takes longer than computing it ({nbytes / (1 << 20):,.1f} MiB in {load:.3g} s, "
            f"{tokens:,} tokens in {compute:.3g} s)"
        )

    def loaded(self, tier: str, nbytes: int, seconds: float) -> None:
        """Loading so many bytes from a tier took so many seconds, in all threads together."""
        with self._lock:
            self._tiers.setdefault(tier, _Tier()).rate.add(seconds, nbytes)

    def computed(self, tokens: int, seconds: float) -> None:
        """A forward over so many tokens took so many seconds."""
        if tokens >= _FEW:
            with self._lock:
                self._computing.add(seconds, tokens)

    @contextmanager
    def loading(self, tier: str) -> Iterator[Callable[[int], None]]:
        """Measures the block, which loads from ``tier`` and calls what this yields with the bytes that it got."""
        with self._lock:
            mine = self._tiers.setdefault(tier, _Tier())
            if not mine.active:
                mine.since, mine.loads, mine.nbytes = time.perf_counter(), 0, 0
            mine.active += 1

        def loaded(nbytes: int) -> None:
            with self._lock:
                mine.loads += 1
                mine.nbytes += nbytes

        try:
            yield loaded
        finally:
            with self._lock:
                mine.active -= 1
                if mine.nbytes and (mine.active <= 0 or mine.loads >= _AT_ONCE):
                    now = time.perf_counter()
                    mine.rate.add(now - mine.since, mine.nbytes)
                    mine.since, mine.loads, mine.nbytes = now, 0, 0

    def computing(self, device: torch.device) -> Callable[[int], None]:
        """Starts to measure a forward through all layers; what is returned ends it, with the number of its tokens.

        On a GPU, where a forward returns before it is computed, by events that nobody waits for.
        """
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()

            def record(tokens: int) -> None:
                last.record()
                with self._lock:
                    self._pending.append((first, last, tokens))
                    over = [one for one in self._pending if one[1].query()]
                    self._pending = deque((one for one in self._pending if one not in over), maxlen=_PENDING)
                for begun, ended, count in over:
                    self.computed(count, begun.elapsed_time(ended) / 1000)

            return record
        start = time.perf_counter()
        return lambda tokens: self.computed(tokens, time.perf_counter() - start)

    def after_fork(self) -> None:
        """In a forked process, the parent's loads are not under way."""
        for tier in self._tiers.values():
            tier.active = 0
        self._pending.clear()
