"""The engine: prompt in, tokens and a report out. The only place where the rooms below are put together."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import methods
from .background import Background
from .corpus.corpus import Ingestion
from .corpus.fusing import FUSED_AT, Task
from .corpus.usage import Usage
from .errors import ConfigurationError, NotComposable, PromptError
from .kv.collections import Encodings
from .kv.encode import Isolated
from .kv.library import KVDtype
from .kv.prefix_caching import PrefixCache, PrefixCaching
from .methods import Method
from .methods.auxiliary import Auxiliary
from .methods.select import Everything
from .model.backbone import Backbone
from .prefill import compose as prefill
from .prefill.compose import Prefill
from .prompt import ChunkIndex
from .report import Report
from .serving.decoding import TextStream
from .serving.hints import Hints
from .serving.limit import RequestLimit
from .serving.lock import FairLock
from .serving.sampling import check, decoding
from .serving.stats import Stats, Tally, total
from .store import Place, Remote
from .weights import verified
from .weights.pull import resolve as resolve_weights

log = logging.getLogger("cacheclip_rag")

GIB = 1 << 30


class _Cancelled(Exception):
    """The caller no longer wants the answer."""


@dataclass(frozen=True)
class Answer:
    """A finished request: the ``text``, its token ``ids``, and the `Report`."""

    text: str
    ids: tuple[int, ...]
    report: Report

    def __str__(self) -> str:
        return self.text


class Engine(Ingestion):
    """Answers prompts, reusing the KV of the chunks it knows.

    Thread-safe: requests take turns at the model, a prefill or a decoding step at a time.
    """

    def __init__(
        self,
        model: str | Path | Backbone,
        *,
        auxiliary: str | Path | Backbone | None = None,
        method: str | Method | None = None,
        recompute_ratio: float | None = None,
        store: str | Path | None = None,
        memory_bytes: int = 4 * GIB,
        disk_bytes: int = 32 * GIB,
        prefix: str | None = None,
        tenant: str = "",
        secret: bytes | str = b"",
        remote: str | Remote | None = None,
        kv_dtype: KVDtype = "auto",
        dtype: torch.dtype | str = "auto",
        device: str | torch.device = "auto",
        on_uncomposable: Literal["error", "prefill"] = "error",
        fuse_when_idle: bool = False,
        require_verified: bool = False,
        max_requests: int = 16,
    ) -> None:
        """``model`` and ``auxiliary``: a catalogue name, hub id, folder, GGUF file, or a loaded `Backbone`.

        ``method`` (see `methods.METHODS`; default ``"cacheclip"`` with an auxiliary model, else ``"auto"``) and
        ``recompute_ratio`` (0..1) can be overridden by each request. ``store``: the folder that keeps chunk KV; None
        keeps it in memory only. ``memory_bytes`` and ``disk_bytes`` cap the two tiers, the auxiliary model's chunks and
        other encodings' included. ``prefix``: the text chunks are encoded behind, whichever method a request names; by
        default what the method says, for most what precedes the user's text in the model's chat template. ``tenant``
        separates chunk KV of different owners; set it from what you know of the caller, not from what the caller says.
        ``secret`` keys the names of files and authenticates them, for a folder that others can write to. ``remote``: an
        fsspec url (``"s3://bucket/folder"``) or a `Remote`, asked for what is not here and given a copy of what is new.
        ``kv_dtype``: "int8" keeps chunk KV in half of bfloat16's bytes (docs/store.md says what that costs in quality).
        ``on_uncomposable``: what to do with a model whose KV cannot be moved: raise `NotComposable`, or serve it by
        plain prefill. ``fuse_when_idle``: while no request is being served, fuse chunks that come often with those they
        come with, for a method that takes fused variants. ``require_verified``: refuse a model that ``cacheclip
        verify`` has not found good on this machine with these libraries. ``max_requests``: how many may be in flight,
        each with the KV of its prompt in memory; others wait. A stream is in flight until it is read to its end or
        closed.

        Raises `ConfigurationError`, `NotComposable`, `WeightsError`, `StoreError`.
        """
        if method is None:
            method = "cacheclip" if auxiliary is not None else "auto"
        self._prefix = prefix
        self.method = methods.resolve(method)
        if prefix is not None:
            self.method = methods.resolve(self.method, prefix=prefix)
        self.recompute_ratio = None if recompute_ratio is None else methods.check_ratio(recompute_ratio)
        self._check_auxiliary(self.method, auxiliary is not None)
        if kv_dtype not in get_args(KVDtype):
            raise ConfigurationError(f'kv_dtype must be "auto" or "int8", not {kv_dtype!r}')
        if max_requests < 1:
            raise ConfigurationError(f"max_requests must be at least 1, not {max_requests}")
        self.backbone = _backbone(model, dtype, device)
        if self.backbone.obstacle is not None and on_uncomposable == "error":
            raise NotComposable(f'{self.backbone.obstacle}; on_uncomposable="prefill" serves it without reuse')
        self.composable = self.backbone.obstacle is None
        self.index = ChunkIndex()
        secret = secret.encode() if isinstance(secret, str) else secret
        remote = Remote(remote) if isinstance(remote, str) else remote
        self._place = Place(store, memory_bytes, disk_bytes, tenant, secret, remote)
        self.documents = self._place.documents
        """Which chunks are of which document."""
        self._encodings = Encodings(self.backbone, self.method.encode, self.index, self._place, kv_dtype)
        self._exact: dict[PrefixCaching, PrefixCache] = {}
        self.auxiliary: Auxiliary | None = None
        if self.composable:
            self.library = self._encodings.main
            if require_verified:
                name = str(self.backbone.model.name_or_path if isinstance(model, Backbone) else model)
                verified.require(verified.identity(self.library.namespace.fields, self.backbone), name)
            self._encodings.reuse(self.method.encode)
            if auxiliary is not None:
                self.auxiliary = self.open_auxiliary(auxiliary, dtype, device, prefix)
        self.usage = Usage(self._place.usage_file(self.library.namespace) if self.composable else None)
        # Counts are saved now and then; a process that ends without `close` saves the last ones as it goes.
        weakref.finalize(self, self.usage.save)
        self._fuse_when_idle = fuse_when_idle
        self.lock, self.limit = FairLock(), RequestLimit(max_requests)
        self._hints = Hints()
        self._background = Background(self._do_later)
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cacheclip-loader")
        self._tally = Tally()
        self.last_report: Report | None = None
        self.observers: list[Callable[[Report], None]] = []
        """Called with the report of each request that has ended, on the thread that ended it: metrics, traces."""

    def open_auxiliary(
        self,
        model: str | Path | Backbone,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device = "auto",
        prefix: str | None = None,
    ) -> Auxiliary:
        """Load a model to select tokens with; assign it to `auxiliary` to use it.

        It only looks, so its chunks stand behind the shared prefix whatever becomes of the primary's.
        """
        return Auxiliary(self._encodings.library(_backbone(model, dtype, device), Isolated(prefix)))

    # ---- answering ------------------------------------------------------------------------------------------------

    def generate(self, prompt: str, **options: Any) -> Answer:
        """Answer a prompt. ``options`` are those of `stream`."""
        stream = self.stream(prompt, **options)
        text = "".join(stream)
        return Answer(text, tuple(stream.ids), stream.report)

    def stream(
        self,
        prompt: str,
        *,
        question: str | None = None,
        method: str | Method | None = None,
        recompute_ratio: float | None = None,
        max_new_tokens: int = 256,
        stop: Sequence[str] | None = None,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> TextStream:
        """Answer a prompt piece by piece: an iterator of text deltas with ``ids`` and ``report`` on it.

        The prefill runs at the first ``next``. Closing the iterator, or setting ``cancel``, ends the request and frees
        its memory. ``question``: the question's text, where the caller knows it. ``stop``: strings that end the answer
        and are not part of it. ``options`` go to ``model.generate`` (``temperature``, ``top_p``, ...); decoding is
        greedy unless a temperature above 0 or ``do_sample=True`` is given.

        Raises `ConfigurationError`, and `PromptError` for an empty prompt, at once; for one beyond the window at the
        first ``next``.
        """
        chosen, ratio = self._recipe(method, recompute_ratio)
        stop = [stop] if isinstance(stop, str) else stop
        check("max_new_tokens", max_new_tokens)
        check("stop", stop or [])
        _check_prompt(prompt)
        options = decoding(options)
        self.backbone.check_options(options)
        if commands := set(stop or ()).intersection(self.backbone.control_tokens):  # which are not part of the text
            ids = self.backbone.tokenizer.convert_tokens_to_ids(sorted(commands))
            options["eos_token_id"] = sorted(self.backbone.ends(options.get("eos_token_id")).union(ids))
        report = Report(chosen.name, ratio)

        def run() -> Iterator[int]:
            start = time.perf_counter()
            seated = False
            try:
                seated = self.limit.acquire(cancel)
                if not seated:
                    return
                ready = self._prefill(prompt, chosen, ratio, question, max_new_tokens, report, cancel)
                length = min(max_new_tokens, self.backbone.window - len(ready.layout))
                steps = self.backbone.generate(
                    ready.layout.ids,
                    ready.logits,
                    self._in_turn(ready.step),
                    max_new_tokens=length,
                    **options,
                )
                ends = self.backbone.ends(options.get("eos_token_id"))
                token = -1
                for token in steps:
                    if not report.completion_tokens:
                        report.ttft = time.perf_counter() - start
                    report.completion_tokens += 1
                    yield token
                    if cancel is not None and cancel.is_set():
                        report.finish_reason = "cancelled"
                        break
                else:
                    at_length = report.completion_tokens >= length and token not in ends
                    report.finish_reason = "length" if at_length else "stop"
            except _Cancelled:
                return
            except Exception:
                report.finish_reason = "error"
                raise
            finally:
                if seated:
                    self.limit.release()
                report.finish_reason = report.finish_reason or "cancelled"
                report.total = time.perf_counter() - start
                self.last_report = report
                self._notify(report)

        return TextStream(run(), self.backbone.tokenizer, report, stop or ())

    def prefill(
        self,
        prompt: str,
        *,
        question: str | None = None,
        method: str | Method | None = None,
        recompute_ratio: float | None = None,
        room: int = 256,
    ) -> Prefill:
        """The prompt's KV on a canvas with ``room`` free slots, and the logits of its last token, without decoding."""
        chosen, ratio = self._recipe(method, recompute_ratio)
        report = Report(chosen.name, ratio)
        start = time.perf_counter()
        result = self._prefill(prompt, chosen, ratio, question, room, report)
        report.ttft = report.total = time.perf_counter() - start
        return result

    def stats(self) -> Stats:
        """What was done since the engine was opened, and what it holds now. Cheap: no file is looked at."""
        stores = [reuse.library.store.stats() for reuse in self._encodings]
        aside = [self.auxiliary.library.store.stats()] if self.auxiliary is not None else []
        return self._tally.snapshot(self.limit.in_flight, self.limit.waiting, total(stores, aside))

    def close(self) -> None:
        """Stop background work, but for uploads, which are waited for. The engine goes on answering, and begins to work
        in the background again when there is something to do.
        """
        self._background.close()
        self.usage.save()
        self._place.settle()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _recipe(self, method: str | Method | None, ratio: float | None) -> tuple[Method, float]:
        chosen = self.recipe(method)
        self._check_auxiliary(chosen, self.auxiliary is not None or not self.composable)
        if ratio is None:
            ratio = self.recompute_ratio if method is None else None
        if ratio is None:
            return chosen, chosen.recompute_ratio
        return dataclasses.replace(chosen, fitted_ratio=None), methods.check_ratio(ratio)

    @staticmethod
    def _check_auxiliary(method: Method, present: bool) -> None:
        if method.select.needs_auxiliary and not present:
            raise ConfigurationError(
                f'method "{method.name}" needs an auxiliary model: auxiliary="smollm2-135m-instruct", '
                'or choose method="query_guided"'
            )

    def _prefill(
        self,
        prompt: str,
        method: Method,
        ratio: float,
        question: str | None,
        room: int,
        report: Report,
        cancel: threading.Event | None = None,
    ) -> Prefill:
        _check_prompt(prompt)
        with self.lock:
            if cancel is not None and cancel.is_set():
                raise _Cancelled  # while it waited for its turn
            if not self.composable:
                report.fallbacks.append(f"plain prefill: {self.backbone.obstacle}")
                return prefill.native(self.backbone, self.index, prompt, report)
            try:
                self._follow()
            except Exception:  # what this process knows already will do
                log.exception("what other processes stored is not known")
            if method.prefix_cache is None and (isinstance(method.select, Everything) or ratio >= 1.0):
                return prefill.full(self.backbone, self.index, prompt, room, report)
            hints, announced = self._hints.of(prompt)
            try:
                if (cache := self.prefix_cache_of(method)) is not None:
                    return prefill.exact(self.backbone, self.index, cache, prompt, room, report)
                result = self._encodings.reuse(method.encode)(
                    prompt,
                    method,
                    ratio,
                    room,
                    report,
                    auxiliary=self.auxiliary,
                    question=question or announced,
                    hints=hints,
                )
            except PromptError:
                raise
            except Exception as error:  # whatever goes wrong in reuse costs time, never the answer
                log.exception("reuse failed; prefilling the whole prompt")
                report.fallbacks.append(f"full prefill: {type(error).__name__}: {error}")
                report.fit, report.requested_ratio = None, ratio
                report.prefix = report.reused = report.recomputed = report.edges = 0
                traceback.clear_frames(error.__traceback__)  # it holds on to the canvas, and memory may be what lacked
                return prefill.full(self.backbone, self.index, prompt, room, report)
        try:
            self._afterwards(report, method)
        except Exception:  # what later requests may gain must not cost this one its answer
            log.exception("what this prompt showed is not followed up")
        return result

    def _afterwards(self, report: Report, method: Method) -> None:
        """Count what was used together; have made again what was missing, and fused what has become hot."""
        if self.usage.note(names := [use.key for use in report.chunks]):
            self._threads.submit(self.usage.save)
        if self._fuse_when_idle and method.fit is not None:
            due = [self.index.text(name) for name in names if self.usage.uses(name) in FUSED_AT]
            self._background.add(Task(text, method, fuse=True) for text in due if text is not None)
        gone = [text for use in report.chunks if use.missing and (text := self.index.text(use.key)) is not None]
        if gone:
            self._background.add(Task(text, method) for text in gone)

    def _notify(self, report: Report) -> None:
        self._tally.add(report)
        log.info("%s", report.line)
        for observer in self.observers:
            try:
                observer(report)
            except Exception:  # who watches must not break an answer
                log.exception("an observer of requests failed")

    def _in_turn(self, step: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
        def turn(token: Tensor, row: int) -> Tensor:
            with self.lock:
                return step(token, row)

        return turn


def _check_prompt(prompt: Any) -> None:
    """Raises `PromptError` for what is no text, and for an empty one."""
    if not isinstance(prompt, str):
        raise PromptError(
            f"a prompt is text, not {type(prompt).__name__}: engine.backbone.chat(messages) makes one of messages"
        )
    if not prompt:
        raise PromptError("the prompt is empty")


def _backbone(model: str | Path | Backbone, dtype: torch.dtype | str, device: str | torch.device) -> Backbone:
    return (
        model if isinstance(model, Backbone) else Backbone.load(resolve_weights(str(model)), dtype=dtype, device=device)
    )
