"""Answering prompts: prefill and decoding under the lock, with a limit on requests in flight."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Generator
from typing import Any

from torch import Tensor

from ..compute import on_cpu
from ..interrupts import raised_by_signal
from ..model.backbone import Backbone
from ..report import Report
from ..serving.limit import Cancel, Place, RequestLimit
from ..serving.lock import FairLock
from .prefiller import Prefiller
from .result import Prefill, PrefillRequest

log = logging.getLogger("cacheclip_rag")


class Cancelled(Exception):
    """Raised in a request that its caller has cancelled."""


class Answering:
    """Runs requests: prefill, then decoding.

    ``before()`` is called under the lock, before the prompt is read; ``after(report, request)`` after the prefill, and
    what it raises is logged. Neither is called for a model whose KV cannot be moved.
    """

    def __init__(
        self,
        backbone: Backbone,
        prefiller: Prefiller,
        lock: FairLock,
        limit: RequestLimit,
        before: Callable[[], object],
        after: Callable[[Report, PrefillRequest], None],
    ) -> None:
        self._backbone, self._prefiller, self._lock, self._limit = backbone, prefiller, lock, limit
        self._before, self._after = before, after

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
        start = time.perf_counter()
        try:
            if not place.take(cancel):
                return
            ready = self.prefill(request, report, cancel)
            length = min(request.room, self._backbone.context_length - len(ready.layout))
            steps = self._backbone.generate(
                ready.layout.ids, ready.logits, self._locked(ready.step), max_new_tokens=length, **options
            )
            token = -1
            for token in iter(on_cpu(lambda: next(steps, None)), None):
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
                self._after(report, request)
            except Exception as error:  # follow-up work for later requests must not fail this one
                if raised_by_signal(error):
                    raise
                log.exception("the follow-up work of this prompt failed")
        return result

    def _locked(self, step: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
        @on_cpu
        def locked(token: Tensor, row: int) -> Tensor:
            with self._lock:
                return step(token, row)

        return locked
