"""The engine: prompt in, tokens and a report out. The only place where the rooms below are put together."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from . import methods
from .corpus.corpus import Corpus, Ensured, Task, require_list
from .corpus.fusing import FUSED_AT, Fusing
from .corpus.usage import Usage
from .deprecation import warn
from .errors import ConfigurationError, NotComposable, PromptError
from .interrupts import raised_by_signal
from .kv.collections import Collections
from .kv.encode import HarvestedVariant, Isolated
from .kv.library import KVDtype, Library
from .kv.prefix_caching import PrefixCache
from .methods import Method
from .methods.auxiliary import Auxiliary
from .model.backbone import Backbone
from .prefill.answering import Answering
from .prefill.prefiller import Prefiller
from .prefill.result import Prefill, PrefillRequest
from .prompt import ChunkIndex
from .report import Report
from .serving import forks
from .serving.decoding import Ending, TextStream
from .serving.hints import Hints
from .serving.limit import RequestLimit
from .serving.lock import FairLock
from .serving.sampling import check, decoding
from .serving.stats import Stats, Tally, total
from .store import Documents, Place, Remote
from .weights import verified
from .weights.pull import resolve as resolve_weights

log = logging.getLogger("cacheclip_rag")

GIB = 1 << 30


@dataclass(frozen=True)
class Answer:
    """A finished request: the ``text``, its token ``ids``, and the `Report`."""

    text: str
    ids: tuple[int, ...]
    report: Report

    def __str__(self) -> str:
        return self.text


class Engine:
    """Answers prompts, reusing the KV of the chunks it knows.

    It has a ``corpus`` and its ``fusing`` (chunks), a ``prefiller`` and ``answering`` (prompts), a ``lock`` (the model
    computes one prefill or decoding step at a time) and a ``limit`` (on requests in flight). Thread-safe.
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
        closed; while none of those in flight is being read, another is let in beyond the limit, lest they wait for one
        another.

        Raises `ConfigurationError`, `NotComposable`, `WeightsError`, `StoreError`.
        """
        self._prefix, self._fuse_when_idle = prefix, fuse_when_idle
        self.method = methods.resolve(method or ("auto" if auxiliary is None else "cacheclip"))
        if prefix is not None:
            self.method = methods.resolve(self.method, prefix=prefix)
        self.recompute_ratio = None if recompute_ratio is None else methods.check_ratio(recompute_ratio)
        _check_auxiliary(self.method, auxiliary is not None)
        if kv_dtype not in get_args(KVDtype):
            raise ConfigurationError(f'kv_dtype must be "auto" or "int8", not {kv_dtype!r}')
        if max_requests < 1:
            raise ConfigurationError(f"max_requests must be at least 1, not {max_requests}")
        self.backbone = _backbone(model, dtype, device)
        self.composable = self.backbone.obstacle is None
        if not self.composable and on_uncomposable == "error":
            raise NotComposable(f'{self.backbone.obstacle}; on_uncomposable="prefill" serves it without reuse')
        self.index = ChunkIndex()
        secret = secret.encode() if isinstance(secret, str) else secret
        remote = Remote(remote) if isinstance(remote, str) else remote
        place = Place(store, memory_bytes, disk_bytes, tenant, secret, remote)
        self.collections = Collections(self.backbone, self.method.encode, self.index, place, kv_dtype)
        if self.composable:
            self.library: Library = self.collections.main
            if require_verified:
                name = str(self.backbone.model.name_or_path if isinstance(model, Backbone) else model)
                verified.require(verified.identity(self.library.namespace.fields, self.backbone), name)
            self.collections.of(self.method.encode)
        self.lock, self.limit = FairLock(), RequestLimit(max_requests)
        self.usage = Usage(place.usage_file(self.library.namespace) if self.composable else None)
        # Counts are saved now and then; a process that ends without `close` saves the last ones as it goes.
        weakref.finalize(self, self.usage.save)
        self.corpus = Corpus(self.collections, place, self.usage, self.lock, self.limit)
        self.fusing = Fusing(self.corpus, self.usage, self.lock)
        self.prefiller = Prefiller(self.collections)
        if self.composable and auxiliary is not None:
            self.auxiliary = self.open_auxiliary(auxiliary, dtype, device, prefix)
        # Its parts must not keep the engine alive: in a circle, its KV would stay until the collector runs.
        engine = weakref.proxy(self)
        self.answering = Answering(
            self.backbone,
            self.prefiller,
            self.lock,
            self.limit,
            before=lambda request: engine._before(request),
            after=lambda report, request: engine._after(report, request),
        )
        self._hints, self._tally = Hints(), Tally()
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cacheclip-loader")
        self.last_report: Report | None = None
        forks.watch(self)
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
        return Auxiliary(self.collections.open_library(_backbone(model, dtype, device), Isolated(prefix)))

    @property
    def auxiliary(self) -> Auxiliary | None:
        """The model that selects tokens for methods that ask one; its chunks are kept and forgotten with the rest."""
        return self.prefiller.auxiliary

    @auxiliary.setter
    def auxiliary(self, auxiliary: Auxiliary | None) -> None:
        self.prefiller.auxiliary = auxiliary
        self.collections.auxiliary = None if auxiliary is None else auxiliary.library

    @property
    def documents(self) -> Documents:
        """Which chunks are of which document."""
        return self.corpus.documents

    # ---- chunks -----------------------------------------------------------------------------------------------------

    def ensure(
        self,
        texts: Iterable[str],
        progress: Callable[[int], None] | None = None,
        *,
        method: str | Method | None = None,
        document: str | None = None,
    ) -> Ensured:
        """Keep the KV of these chunks: encode what is missing, leave what is there.

        Encoded as the engine's method wants it, or as ``method`` does; short chunks together, as many as keep the
        processor busy. Never raises for a chunk: one that cannot be encoded or kept is listed with the reason, and
        prompts that contain it are prefilled as usual. Interrupting it loses nothing that was finished.
        ``progress(done)`` is called for each chunk. ``document``: what they are chunks of, for `forget_document`.

        Raises `ConfigurationError` for one text instead of several, and for an unknown method.
        """
        return self.corpus.ensure(texts, self.recipe(method), progress, document)

    def ensure_later(self, texts: Iterable[str]) -> None:
        """Like `ensure`, in the background, while no request is being served."""
        self.corpus.ensure_later(texts, self.method)

    def flush(self) -> None:
        """Wait until everything asked of `ensure_later` is done, and is at the remote store if there is one."""
        self.corpus.flush()

    def knows(self, text: str) -> bool:
        """Whether the KV of this chunk is kept."""
        if not self.composable:
            return False
        return text in self.library if self.method.ahead else self.library.key(text) in self.index

    def forget(self, texts: Iterable[str]) -> None:
        """Drop the KV of these chunks, whatever was computed behind them, the auxiliary model's included, and all that
        prefix caching keeps of prompts; whichever documents have them, for all models in the store's folder.

        It reads the beginning of every file of other models and encodings in the folder. Interrupted, it can be
        repeated. Raises `StoreError` when something cannot be removed: repeat it then.
        """
        self.corpus.forget(texts)

    def forget_document(self, *documents: str) -> None:
        """Drop what `ensure` kept of these documents, for all models in the store's folder and at the remote; chunks
        that another document has as well stay.

        It reads the beginning of every file in the folder, and once of those at the remote. Interrupted, it can be
        repeated. Raises `StoreError` when something cannot be removed, a remote that is away included: repeat it then.
        """
        self.corpus.forget_document(*documents)

    def fuse(
        self,
        neighbours: Mapping[str, Sequence[str]],
        progress: Callable[[int], None] | None = None,
        *,
        method: str | Method | None = None,
        variants: int = 3,
    ) -> Ensured:
        """Keep another KV of these chunks: each computed behind its neighbours, chunks it is likely to follow.

        ``neighbours``: texts by text, the nearest first, as `corpus.neighbours.similar` finds them. Chunks and
        neighbours that `ensure` was not asked for are left out, so that fusing brings back nothing that was forgotten.
        What is there is not computed again: stop it whenever you like and call it again, after adding documents, too.
        Of more than so many ``variants`` of a chunk the oldest are dropped. ``method`` says how chunks are encoded.
        Never raises for a chunk. Raises `ConfigurationError` for what is no mapping from texts to several texts.
        """
        return self.fusing.fuse(neighbours, self.recipe(method), progress, variants)

    def fuse_in_order(
        self,
        sequences: Iterable[Sequence[str]],
        progress: Callable[[int], None] | None = None,
        *,
        method: str | Method | None = None,
        variants: int = 3,
    ) -> Ensured:
        """Keep the KV that prompts of these chunks, in this order, would leave: each chunk behind all those before it.

        A prompt that holds such a sequence again is answered as full prefill answers it, up to the text between chunks;
        one that holds most of it, nearly so. Each sequence costs what prefilling it costs. The rest is as in `fuse`.
        """
        return self.fusing.fuse_in_order(sequences, self.recipe(method), progress, variants)

    def fuse_used(
        self, least: int = 2, count: int = 10, progress: Callable[[int], None] | None = None, **options: Any
    ) -> Ensured:
        """Fuse the chunks that came in ``least`` prompts or more, each with the ``count`` others that will stand in
        front of it most often (`contexts`). ``options`` are those of `fuse`, and so is the rest.
        """
        return self.fuse(self.contexts(least, count), progress, **options)

    def contexts(self, least: int = 2, count: int = 10) -> dict[str, list[str]]:
        """What `fuse_used` fuses: chunks of ``least`` prompts or more, each with those it is expected behind."""
        return self.fusing.contexts(least, count)

    def fused(self, text: str, method: str | Method | None = None) -> list[tuple[str, ...]]:
        """Behind which chunks the kept KV of this chunk was computed, besides that of the chunk by itself: the texts
        that stood in front of it, a tuple for each variant. ``method`` says how chunks are encoded.
        """
        return self.collections.of(self.recipe(method).encode).variants.held(text) if self.composable else []

    def hint(self, texts: Sequence[str], question: str | None = None) -> None:
        """Advice from a retriever: these chunks and this question are about to come in a prompt.

        Starts loading their KV into memory, settles ties in recognition, and tells the question from the instructions
        around it. Wrong or missing advice costs nothing but time. Raises `ConfigurationError` for one text instead of
        several.
        """
        texts = list(require_list(texts))
        if self.composable:
            keys = frozenset(self.library.key(text) for text in texts)
            self._hints.note(question, keys)
            self._threads.submit(lambda: [self.library.get(key) for key in keys])

    def library_of(self, method: str | Method) -> Library:
        """Where the chunks are kept that are encoded as ``method`` wants them."""
        return self.collections.of(self.recipe(method).encode).library

    def variants_of(self, method: str | Method, text: str) -> list[HarvestedVariant]:
        """What finished prompts left of a chunk, for a method that harvests them; for another nothing."""
        harvested = self.collections.of(self.recipe(method).encode).harvested
        return [] if harvested is None else harvested.of(self.library.key(text))

    def prefix_cache_of(self, method: str | Method) -> PrefixCache | None:
        """What a method that does prefix caching has kept of prompts; None for another method."""
        caching = self.recipe(method).prefix_cache
        return None if caching is None else self.collections.prefix_cache(caching)

    def recipe(self, method: str | Method | None = None) -> Method:
        """What a request that names this method is served by; None is the engine's own. Chunks stand behind the
        engine's ``prefix``, if it was given one, unless the method names another. Raises `ConfigurationError`.
        """
        return self.method if method is None else methods.with_prefix(method, self._prefix)

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def generate(self, prompt: str, **options: Any) -> Answer:
        """Answer a prompt. ``options`` are those of `stream`."""
        with self.stream(prompt, **options) as stream:
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
        seed: int | None = None,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> TextStream:
        """Answer a prompt piece by piece: an iterator of text deltas with ``ids`` and ``report`` on it.

        The prefill runs at the first ``next``. Closing the iterator, from whichever thread, or setting ``cancel``, ends
        the request and frees its memory; so does an exception while a token is computed. ``question``: the question's
        text, where the caller knows it. ``stop``: strings that end the answer and are not part of it. ``seed``: sample
        with a random generator of this request's own, whatever others are sampled meanwhile. ``options`` go to
        ``model.generate`` (``temperature``, ``top_p``, ...); decoding is greedy unless a temperature above 0 or
        ``do_sample=True`` is given.

        Raises `ConfigurationError`, and `PromptError` for an empty prompt, at once; for one beyond the context length
        at the first ``next``.
        """
        chosen, ratio = self._method_and_ratio(method, recompute_ratio)
        stop = [stop] if isinstance(stop, str) else stop
        check("max_new_tokens", max_new_tokens)
        check("stop", stop or [])
        if seed is not None:
            check("seed", seed)
        _check_prompt(prompt)
        options = self._decoding(options, stop or ()) | {"seed": seed}
        ending = Ending(cancel)
        report = Report(chosen.name, ratio)
        request = PrefillRequest(prompt, chosen, ratio, max_new_tokens, question)
        tokens = self._told(self.answering.tokens(request, options, report, ending), report)
        return TextStream(tokens, self.backbone.tokenizer, report, stop or (), ending)

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
        chosen, ratio = self._method_and_ratio(method, recompute_ratio)
        report = Report(chosen.name, ratio)
        start = time.perf_counter()
        _check_prompt(prompt)
        result = self.answering.prefill(PrefillRequest(prompt, chosen, ratio, room, question), report)
        report.ttft = report.total = time.perf_counter() - start
        return result

    def stats(self) -> Stats:
        """What was done since the engine was opened, and what it holds now. Cheap: no file is looked at."""
        stores = [each.library.store.stats() for each in self.collections]
        auxiliary = self.collections.auxiliary
        aside = [] if auxiliary is None else [auxiliary.store.stats()]
        return self._tally.snapshot(self.limit.in_flight, self.limit.waiting, total(stores, aside))

    def close(self) -> None:
        """Stop background work, but for uploads, which are waited for. The engine goes on answering, and begins to work
        in the background again when there is something to do.
        """
        self.corpus.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def after_fork(self) -> None:
        """In a forked process, whose only thread is the one that forked."""
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cacheclip-loader")

    # ---- former names -----------------------------------------------------------------------------------------------

    def company(self, least: int = 2, count: int = 10) -> dict[str, list[str]]:
        """The former name of `contexts`."""
        warn("Engine.company", "Engine.contexts")
        return self.contexts(least, count)

    def exact_of(self, method: str | Method) -> PrefixCache | None:
        """The former name of `prefix_cache_of`."""
        warn("Engine.exact_of", "Engine.prefix_cache_of")
        return self.prefix_cache_of(method)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _method_and_ratio(self, method: str | Method | None, ratio: float | None) -> tuple[Method, float]:
        chosen = self.recipe(method)
        _check_auxiliary(chosen, self.auxiliary is not None or not self.composable)
        if ratio is None:
            ratio = self.recompute_ratio if method is None else None
        if ratio is None:
            return chosen, chosen.recompute_ratio
        return dataclasses.replace(chosen, fitted_ratio=None), methods.check_ratio(ratio)

    def _decoding(self, options: Mapping[str, Any], stop: Sequence[str]) -> dict[str, Any]:
        """Options for `Backbone.generate`. A control token among the stop strings is not part of the text: it becomes a
        token that ends the answer.
        """
        settled = decoding(options)
        self.backbone.check_options(settled)
        if commands := set(stop).intersection(self.backbone.control_tokens):
            ids = self.backbone.tokenizer.convert_tokens_to_ids(sorted(commands))
            settled["eos_token_id"] = sorted(self.backbone.ends(settled.get("eos_token_id")).union(ids))
        return settled

    def _before(self, request: PrefillRequest) -> PrefillRequest:
        """Take note of what other processes did, and of what retrievers announced."""
        try:
            self.corpus.follow()
        except Exception as error:  # what this process knows already will do
            if raised_by_signal(error):
                raise
            log.exception("what other processes stored is not known")
        hints, announced = self._hints.of(request.prompt)
        return dataclasses.replace(request, question=request.question or announced, hints=hints)

    def _after(self, report: Report, request: PrefillRequest) -> None:
        """Count what was used together; have made again what was missing, and fused what has become hot."""
        if self.usage.note(names := [use.key for use in report.chunks]):
            self._threads.submit(self.usage.save)
        method = request.method
        if self._fuse_when_idle and method.fit is not None:
            due = [self.index.text(name) for name in names if self.usage.uses(name) in FUSED_AT]
            self.corpus.background.add(Task(text, method, fuse=True) for text in due if text is not None)
        gone = [text for use in report.chunks if use.missing and (text := self.index.text(use.key)) is not None]
        if gone:
            self.corpus.background.add(Task(text, method) for text in gone)

    def _told(self, tokens: Iterator[int], report: Report) -> Iterator[int]:
        """These tokens; once they have ended, however they did, whoever counts and watches requests is told."""
        try:
            yield from tokens
        finally:
            self.last_report = report
            self._notify(report)

    def _notify(self, report: Report) -> None:
        self._tally.add(report)
        log.info("%s", report.line)
        for observer in self.observers:
            try:
                observer(report)
            except Exception as error:  # who watches must not break an answer
                if raised_by_signal(error):
                    raise
                log.exception("an observer of requests failed")


def _check_auxiliary(method: Method, present: bool) -> None:
    if method.select.needs_auxiliary and not present:
        raise ConfigurationError(
            f'method "{method.name}" needs an auxiliary model: auxiliary="smollm2-135m-instruct", '
            'or choose method="query_guided"'
        )


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
