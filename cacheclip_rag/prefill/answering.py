"""Answering prompts: prefill and decoding under the lock, with a limit on requests in flight."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Generator
from typing import Any
from weakref import WeakMethod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..compute import on_cpu
from ..interrupts import raised_by_signal
from ..model.backbone import Backbone, CanvasStep
from ..report import Report
from ..serving.limit import Cancel, Place, RequestLimit
from ..serving.lock import FairLock
from ..serving.lookup import Lookup
from ..serving.steps import Steps, Stream
from .prefiller import Prefiller
from .reading import Reading
from .result import Prefill, PrefillRequest

log = logging.getLogger("cacheclip_rag")


class Cancelled(Exception):
    """Raised in a request that its caller has cancelled."""


class _Drafts(Lookup):
    """A request's drafts: short ones while many streams share a pass, and counted in its report."""

    def __init__(self, most: int, stream: Stream, report: Report) -> None:
        super().__init__(most)
        self._stream, self._report = stream, report

    def propose(self, ids: NDArray[np.int64], most: int) -> NDArray[np.int64]:
        return super().propose(ids, min(most, self._stream.most))

    def note(self, drafted: int, accepted: int) -> None:
        super().note(drafted, accepted)
        self._report.drafted, self._report.looked_up = self.drafted, self.accepted


class Answering:
    """Runs requests: prefill, then decoding, whose ``steps`` several requests share.

    ``before()`` is called under the lock, before the prompt is read; ``after(result, request, reading)`` after the
    prefill, and what it raises is logged. Neither is called for a model whose KV cannot be moved. ``prompt_lookup``:
    tokens of a draft at most (see `serving.lookup`); 0 for none.
    """

    def __init__(
        self,
        backbone: Backbone,
        prefiller: Prefiller,
        lock: FairLock,
        limit: RequestLimit,
        before: Callable[[], object],
        after: Callable[[Prefill, PrefillRequest, Reading], None],
        prompt_lookup: int = 10,
    ) -> None:
        self._backbone, self._prefiller, self._lock, self._limit = backbone, prefiller, lock, limit
        self._before, self._after, self._prompt_lookup = before, after, prompt_lookup
        self.steps = Steps(lock)
        backbone.computer.between = WeakMethod(self.steps.run_waiting)

    def tokens(
        self, request: PrefillRequest, options: dict[str, Any], report: Report, cancel: Cancel | None = None
    ) -> Generator[int, None, None]:
        """Prefill and decode: yields the answer's token ids. Waits for the limit on requests in flight.

        ``request.room`` is the maximum length of the answer (tokens); ``options`` are those of `Backbone.generate`.
        Closing the iterator, or setting ``cancel``, ends the request. Raises what `prefill` raises.
        """
        place = self._limit.place()
        tokens = self._tokens(place, request, options, report, cancel)
        place.owner = weakref.ref(tokens)
        return tokens

    def _tokens(
        self,
        place: Place,
        request: PrefillRequest,
        options: dict[str, Any],
        report: Report,
        cancel: Cancel | None,
    ) -> Generator[int, None, None]:
        start, stream = time.perf_counter(), self.steps.stream()
        try:
            if not place.take(cancel):
                return
            ready = self.prefill(request, report, cancel)
            taken = len(ready.layout) + report.soft_tokens
            length = min(request.room, self._backbone.context_length - taken)
            drafts = _Drafts(self._prompt_lookup, stream, report) if ready.canvas is not None else None
            tokens = self._backbone.generate(
                ready.layout.ids,
                ready.logits,
                self._step(ready.step, stream),
                max_new_tokens=length,
                drafts=drafts,
                **options,
            )
            token = -1
            for token in iter(on_cpu(lambda: next(tokens, None)), None):
                if not report.completion_tokens:
                    report.ttft = time.perf_counter() - start
                report.completion_tokens += 1
                place.resting_since = time.monotonic()
                yield token
                place.resting_since = None
                if cancel is not None and cancel.is_set():
                    report.finish_reason = "cancelled"
                    break
            else:
                ended = token in self._backbone.ends(options.get("eos_token_id"))
                report.finish_reason = "length" if report.completion_tokens >= length and not ended else "stop"
        except Cancelled:
            return
        except Exception:
            report.finish_reason = "error"
            raise
        finally:
            stream.close()
            place.release()
            report.finish_reason = report.finish_reason or "cancelled"
            report.total = time.perf_counter() - start

    @on_cpu
    def prefill(self, request: PrefillRequest, report: Report, cancel: Cancel | None = None) -> Prefill:
        """Read the prompt, then prefill under the lock. Raises `Cancelled` if ``cancel`` was set while waiting for it,
        and what `Prefiller` raises.
        """
        movable = self._backbone.obstacle is None
        if movable:
            with self._lock:
                self._before()
        reading = self._prefiller.read(request, report)  # others may compute meanwhile
        with self._lock:
            if cancel is not None and cancel.is_set():
                raise Cancelled
            result = self._prefiller(request, reading, report)
        if movable:
            try:
                self._after(result, request, reading)
            except Exception as error:  # follow-up work for later requests must not fail this one
                if raised_by_signal(error):
                    raise
                log.exception("the follow-up work of this prompt failed")
        return result

    def _step(self, step: Callable[[Tensor, int], Tensor], stream: Stream) -> Callable[[Tensor, int], Tensor]:
        """``step`` as a part of the passes that streams share, or under the lock if it is not on a canvas."""

        @on_cpu
        def alone(tokens: Tensor, row: int) -> Tensor:
            with self._lock:
                return step(tokens, row)

        @on_cpu
        def shared(tokens: Tensor, row: int) -> Tensor:
            assert isinstance(step, CanvasStep)
            return stream(step.part(tokens, row), step.computer.steps)

        return shared if isinstance(step, CanvasStep) else alone
