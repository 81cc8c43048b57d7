"""Prompts answered: prefill and decoding, so many requests in flight, one at the model at a time."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Generator
from typing import Any

from torch import Tensor

from ..interrupts import raised_by_signal
from ..model.backbone import Backbone
from ..report import Report
from ..serving.limit import Cancel, Place, RequestLimit
from ..serving.lock import FairLock
from .prefiller import Prefiller
from .result import Prefill, PrefillRequest

log = logging.getLogger("cacheclip_rag")


class Cancelled(Exception):
    """The caller no longer wants the answer."""


class Answering:
    """Runs requests. ``before(request)`` is called under the lock and gives the request as it is prefilled;
    ``after(report, method)`` once it is. Neither is called where KV cannot be moved; what ``after`` raises is logged.
    """

    def __init__(
        self,
        backbone: Backbone,
        prefiller: Prefiller,
        lock: FairLock,
        limit: RequestLimit,
        before: Callable[[PrefillRequest], PrefillRequest],
        after: Callable[[Report, PrefillRequest], None],
    ) -> None:
        self._backbone, self._prefiller, self._lock, self._limit = backbone, prefiller, lock, limit
        self._before, self._after = before, after

    def tokens(
        self, request: PrefillRequest, options: dict[str, Any], report: Report, cancel: Cancel | None = None
    ) -> Generator[int, None, None]:
        """Prefill and decode, within the limit on requests in flight; ``request.room`` is the longest answer (tokens).

        The request ends when this is closed, or ``cancel`` is set. ``options`` are those of `Backbone.generate`.
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
            for token in steps:
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

    def prefill(self, request: PrefillRequest, report: Report, cancel: Cancel | None = None) -> Prefill:
        """Raises `Cancelled` where ``cancel`` was set while it waited for the lock, and what `Prefiller` raises."""
        movable = self._backbone.obstacle is None
        with self._lock:
            if cancel is not None and cancel.is_set():
                raise Cancelled
            if movable:
                request = self._before(request)
            result = self._prefiller(request, report)
        if movable:
            try:
                self._after(report, request)
            except Exception as error:  # what later requests may gain must not cost this one its answer
                if raised_by_signal(error):
                    raise
                log.exception("what this prompt showed is not followed up")
        return result

    def _locked(self, step: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
        def locked(token: Tensor, row: int) -> Tensor:
            with self._lock:
                return step(token, row)

        return locked
