"""Decoding steps of several streams in one forward: the model's weights are read once for all of them."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence

from torch import Tensor

from ..compute import Part
from ..interrupts import Gate, raised_by_signal
from .lock import FairLock

RunParts = Callable[[Sequence[Part]], Sequence[Tensor]]
"""A model's forward over rows of several requests; returns the logits ``[n, V]`` of each one's rows."""

ROWS = 16
"""Rows of a pass that streams share: what drafts may bring it to. On a CPU, more rows take more time."""
_SHARE, _MOST = 0.2, 0.02
"""How long a pass waits for streams that are about to ask: this share of the last pass, and so many seconds at most."""


class Stream:
    """One request's decoding steps. Call it with the rows of a step, and the model's forward over several requests'
    rows, for their logits ``[n, V]``; `close` it at the end. ``gate`` is opened when the result is there.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.gate = Gate()
        self.part: Part | None = None
        self.run_parts: RunParts | None = None
        self.result: Tensor | Exception | None = None
        self.delivered = self.thought = float("-inf")
        """When the last result was delivered, and how many seconds later the next step was asked for."""

    def __call__(self, part: Part, run_parts: RunParts) -> Tensor:
        return self._steps.run(self, part, run_parts)

    @property
    def ready(self) -> bool:
        return self.result is not None

    @property
    def most(self) -> int:
        """Tokens of a draft at most, for the passes to stay within `ROWS`."""
        return ROWS // max(1, self._steps.active) - 1

    def deliver(self, result: Tensor | Exception) -> None:
        self.delivered = time.monotonic()
        self.result = result
        self.gate.open()

    def close(self) -> None:
        self._steps.leave(self)


class Steps:
    """Whoever has the lock runs the steps of all who wait, and hands them their logits.

    A step that fails fails alone: the others are computed without it.
    """

    def __init__(self, lock: FairLock) -> None:
        self._lock = lock
        # In both, an operation is one of a dictionary, which an interrupt leaves whole.
        self._streams: dict[Stream, None] = {}
        self._waiting: dict[Stream, None] = {}
        self._arrived = Gate()
        self._seconds = 0.0
        self.passes = 0
        """Forwards so far."""

    def stream(self) -> Stream:
        stream = Stream(self)
        self._streams[stream] = None
        return stream

    @property
    def active(self) -> int:
        """How many streams are being decoded: those that had a token within the last passes."""
        since = time.monotonic() - max(4 * self._seconds, 0.1)
        return sum(stream.delivered >= since or stream in self._waiting for stream in list(self._streams))

    def run(self, stream: Stream, part: Part, run_parts: RunParts) -> Tensor:
        """The logits ``[n, V]`` of a step's rows. Raises what computing them raised."""
        stream.thought = time.monotonic() - stream.delivered
        stream.part, stream.run_parts, stream.result = part, run_parts, None
        self._waiting[stream] = None
        self._arrived.open()
        try:
            while not stream.ready:
                self._take_turn(stream)
        finally:
            stream.part = None
            self._waiting.pop(stream, None)
        result, stream.result = stream.result, None
        if isinstance(result, Exception):
            raise result
        assert result is not None
        return result

    def run_waiting(self) -> None:
        """Compute the steps of all who wait, in one pass. For who has the lock, in the middle of a prefill, too."""
        taken = [stream for stream in list(self._waiting) if self._take(stream)]
        if not taken:
            return
        try:
            for run_parts in dict.fromkeys(stream.run_parts for stream in taken):  # one for each model, mostly one
                if run_parts is not None:
                    self._run([stream for stream in taken if stream.run_parts == run_parts], run_parts)
        finally:  # after an interrupt, which is another's
            for stream in taken:
                if not stream.ready and stream.part is not None:
                    self._waiting[stream] = None

    def leave(self, stream: Stream) -> None:
        self._streams.pop(stream, None)
        self._waiting.pop(stream, None)

    def after_fork(self) -> None:
        """In a forked process: the threads of the streams are gone."""
        self._streams, self._waiting = {}, {}

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _take_turn(self, stream: Stream) -> None:
        with self._lock.turn(stream) as mine:
            if mine:
                if not stream.ready:
                    self._waiting[stream] = None  # an interrupt may have hit whoever had taken it
                self._gather()
                self.run_waiting()
        if not stream.ready:  # somebody computes it at this moment
            stream.gate.wait(0.01)

    def _gather(self) -> None:
        """Wait a little for the streams that asked for their next step quickly the last time."""
        patience = min(_SHARE * self._seconds, _MOST)
        end = time.monotonic() + patience
        while (now := time.monotonic()) < end:
            if not any(self._is_due(stream, now, patience) for stream in list(self._streams)):
                return
            self._arrived.wait(min(end - now, 0.005))

    def _is_due(self, stream: Stream, now: float, patience: float) -> bool:
        soon = stream.thought < patience and now - stream.delivered < patience
        return soon and stream not in self._waiting

    def _take(self, stream: Stream) -> bool:
        return self._waiting.pop(stream, self) is None and stream.part is not None

    def _run(self, streams: Sequence[Stream], run_parts: RunParts) -> None:
        start, parts = time.monotonic(), [stream.part for stream in streams if stream.part is not None]
        self.passes += 1
        results, error = _attempt(run_parts, parts)
        if error is None:
            self._seconds = time.monotonic() - start
            for stream, result in zip(streams, results, strict=True):
                stream.deliver(result)
        elif len(streams) == 1:
            streams[0].deliver(error)
        else:
            for stream in streams:
                self._run([stream], run_parts)


def _attempt(run_parts: RunParts, parts: Sequence[Part]) -> tuple[Sequence[Tensor], Exception | None]:
    """The logits, or what computing them raised: without its tensors, which a second attempt may need the memory of."""
    try:
        return run_parts(parts), None
    except Exception as error:
        if raised_by_signal(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return (), error
