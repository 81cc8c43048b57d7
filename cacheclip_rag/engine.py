"""The engine: a prompt in, tokens and a report out; it assembles the corpus, the prefiller and the lock."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from . import methods
from .compute import on_cpu
from .corpus.corpus import Corpus, Ensured, require_list
from .corpus.fusing import Fusing
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
from .methods.head import read_head
from .model.adapter import check_fitted
from .model.backbone import Backbone
from .model.decode_weights import Format
from .model.decode_weights import check as check_format
from .prefill.answering import Answering
from .prefill.audit import Audit, Auditor
from .prefill.prefiller import Prefiller
from .prefill.reading import Reading
from .prefill.result import Prefill, PrefillRequest
from .prompt import ChunkIndex
from .report import Report
from .serving import forks
from .serving.callers import named
from .serving.decoding import Ending, TextStream
from .serving.hints import Hints
from .serving.limit import RequestLimit
from .serving.lock import FairLock
from .serving.sampling import EFFECTIVE, check, decoding
from .serving.stats import Stats, Tally, total
from .store import Documents, Place, Remote
from .weights import verified
from .weights.opened import open_backbone

log = logging.getLogger("cacheclip_rag")

GIB = 1 << 30


@dataclass(frozen=True)
class Answer:
    """A complete answer: its ``text``, its token ``ids``, and the `Report` of the request."""

    text: str
    ids: tuple[int, ...]
    report: Report

    def __str__(self) -> str:
        return self.text


class Engine:
    """Answers prompts with a causal language model, reusing the stored KV of the chunks they contain.

    It has a ``corpus`` and its ``fusing`` (chunks), a ``prefiller`` and ``answering`` (prompts), a ``lock`` (the model
    computes one prefill, or one decoding step of all streams, at a time) and a ``limit`` (on requests in flight).
    Thread-safe.
    """

    @on_cpu
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
        prompt_lookup: int = 10,
        decode_weights: Format = "auto",
        audit: float | Audit = 0.0,
    ) -> None:
        """``model`` and ``auxiliary``: a catalogue name, hub id, folder, GGUF file, or a loaded `Backbone`.

        ``method`` (see `methods.METHODS`; default ``"cacheclip"`` with an auxiliary model, else ``"auto"``) and
        ``recompute_ratio`` (0..1) can be overridden per request. ``store``: the folder that keeps chunk KV; None keeps
        it in memory only. ``memory_bytes`` and ``disk_bytes`` cap the two tiers, including the chunks of the auxiliary
        model and of other encodings, and in memory all other KV that is kept: the preambles of prompts, prefix caches
        and harvested variants. ``prefix``: the text that chunks are
        encoded behind, whichever method a request names; by default the method decides, and most take what precedes the
        user's text in the model's chat template. ``tenant`` separates the chunk KV of different owners; set it from
        what you know of the caller, not from what the caller says. ``secret`` keys the names of files and authenticates
        them, for a folder that others can write to. ``remote``: an fsspec url (``"s3://bucket/folder"``) or a `Remote`;
        it is asked for chunks that are not here, and new chunks are copied to it. ``kv_dtype``: "int8" stores chunk KV
        in half the bytes of bfloat16 (docs/store.md says what that costs in quality). ``on_uncomposable``: what to do
        with a model whose KV cannot be moved: raise `NotComposable`, or serve it by plain prefill. ``fuse_when_idle``:
        while no request is being served, fuse the chunks of each prompt in its order, where the store has spare room,
        and frequent chunks with those they are retrieved with, for a method that takes fused variants.
        ``require_verified``: refuse a model that ``cacheclip verify`` has not passed on this machine with these
        libraries. ``max_requests``: how many may be in flight, each with the KV of its prompt in memory; others wait. A
        stream is in flight until it is read to its end or closed; while none of those in flight is being read, another
        one is admitted beyond the limit, so that they do not wait for one another. ``prompt_lookup``: how many tokens
        are drafted at a time from where the latest ones stood before, in the prompt or the answer, and verified by one
        forward (see `serving.lookup`); 0 for none. It changes no answer. ``decode_weights``: "int4" lets decoding steps
        of few rows read a second copy of the weights, in 4 bits, on a CPU; it changes answers (docs/decoding.md says
        how much). A loaded `Backbone` has been told already. ``audit``: the share of prompts that is prefilled again in
        full, in idle time, and compared with how they were answered (docs/observability.md), or an `Audit`; 0 for none.

        Raises `ConfigurationError`, `NotComposable`, `WeightsError`, `StoreError`.
        """
        self._prefix, self._fuse_when_idle = prefix, fuse_when_idle
        self.method = methods.resolve(method or ("auto" if auxiliary is None else "cacheclip"))
        if prefix is not None:
            self.method = methods.resolve(self.method, prefix=prefix)
        self.recompute_ratio = None if recompute_ratio is None else methods.check_ratio(recompute_ratio)
        _check_auxiliary(self.method, auxiliary is not None)
        _check_adapter(self.method)
        if kv_dtype not in get_args(KVDtype):
            raise ConfigurationError(f'kv_dtype must be "auto" or "int8", not {kv_dtype!r}')
        auditing = audit if isinstance(audit, Audit) else Audit(audit)
        if max_requests < 1:
            raise ConfigurationError(f"max_requests must be at least 1, not {max_requests}")
        if prompt_lookup < 0:
            raise ConfigurationError(f"prompt_lookup must be at least 0 (no drafts), not {prompt_lookup}")
        self.backbone = _backbone(model, dtype, device, decode_weights)
        self.composable = self.backbone.obstacle is None
        if not self.composable and on_uncomposable == "error":
            raise NotComposable(f'{self.backbone.obstacle}; on_uncomposable="prefill" serves it without reuse')
        self.index = ChunkIndex(self.backbone.quotes)
        secret = secret.encode() if isinstance(secret, str) else secret
        remote = Remote(remote) if isinstance(remote, str) else remote
        place = Place(store, memory_bytes, disk_bytes, tenant, secret, remote)
        self.collections = Collections(self.backbone, self.method.encode, self.index, place, kv_dtype)
        self.collections.backbone_of(self.method.encode)  # raises for an adapter that does not fit
        if self.composable:
            self.library: Library = self.collections.main
            if require_verified:
                name = str(self.backbone.model.name_or_path if isinstance(model, Backbone) else model)
                fields = {**self.library.namespace.fields, **self.backbone.fingerprint()}  # without an adapter
                verified.require(verified.identity(fields, self.backbone), name)
            self.collections.of(self.method.encode)
        self.lock, self.limit = FairLock(), RequestLimit(max_requests)
        self.usage = Usage(place.usage_file(self.library.namespace) if self.composable else None)
        # Counts are saved every few prompts; this saves the last ones if the process ends without `close`.
        weakref.finalize(self, self.usage.save)
        self.corpus = Corpus(self.collections, place, self.usage, self.lock, self.limit)
        self.fusing = Fusing(self.corpus, self.usage, self.lock)
        self.auditor = Auditor(auditing, self.collections, self.lock, self.limit)
        self.corpus.on_forget.append(self.auditor.forget)
        self.prefiller = Prefiller(self.collections)
        if self.composable and auxiliary is not None:
            self.auxiliary = self.open_auxiliary(auxiliary, dtype, device, prefix)
        # A proxy, because a reference cycle would keep the engine's KV in memory until the garbage collector runs.
        engine = weakref.proxy(self)
        self.answering = Answering(
            self.backbone,
            self.prefiller,
            self.lock,
            self.limit,
            before=lambda: engine._before(),
            after=lambda *done: engine._after(*done),
            prompt_lookup=prompt_lookup,
        )
        self._hints, self._tally = Hints(), Tally()
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cacheclip-usage")
        self.last_report: Report | None = None
        forks.watch(self)
        self.observers: list[Callable[[Report], None]] = []
        """Called with the report of each finished request, on the thread that finished it: for metrics and traces."""

    def open_auxiliary(
        self,
        model: str | Path | Backbone,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device = "auto",
        prefix: str | None = None,
    ) -> Auxiliary:
        """Load an auxiliary model, which selects tokens; assign it to `auxiliary` to use it.

        Its chunks are encoded behind the shared prefix, whatever encoding the primary model's chunks have: only its
        attention scores are used. ``model`` may be a folder that `cacheclip tune` wrote; one that was fitted
        to another model than this engine's is used with a warning in the log. Raises `NotComposable`, `WeightsError`,
        `ConfigurationError`.
        """
        backbone, head = _backbone(model, dtype, device), None
        if backbone.trained is not None:
            check_fitted(backbone.trained, self.backbone)
            head = read_head(backbone.trained)
        return Auxiliary(self.collections.open_library(backbone, Isolated(prefix)), head)

    @property
    def auxiliary(self) -> Auxiliary | None:
        """The auxiliary model, or None; its chunks are stored and forgotten together with the primary model's."""
        return self.prefiller.auxiliary

    @auxiliary.setter
    def auxiliary(self, auxiliary: Auxiliary | None) -> None:
        self.prefiller.auxiliary = auxiliary
        self.collections.auxiliary = None if auxiliary is None else auxiliary.library

    @property
    def documents(self) -> Documents:
        """Which chunks belong to which document."""
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
        """Compute and store the KV of these chunks, except those that are stored already.

        They are encoded as ``method`` wants it, by default the engine's; short chunks share a forward. Never raises for
        a chunk: one that cannot be encoded or stored is listed in the result with the reason, and prompts that contain
        it are prefilled as usual. After an interruption, what was finished is kept. ``progress(done)`` is called once
        per chunk. ``document``: the id of the document they are chunks of, for `forget_document`.

        Raises `ConfigurationError` for a single text instead of a list, and for an unknown method.
        """
        return self.corpus.ensure(texts, self.recipe(method), progress, document)

    def ensure_later(self, texts: Iterable[str]) -> None:
        """Like `ensure`, in the background, while no request is being served."""
        self.corpus.ensure_later(texts, self.method)

    def flush(self) -> None:
        """Wait until all work of `ensure_later` is done, and uploaded if there is a remote store, and all audits."""
        self.corpus.flush()
        self.auditor.flush()

    def knows(self, text: str) -> bool:
        """Whether this chunk is known: its KV is stored, or its text is recognised by a method that stores no KV
        ahead.
        """
        if not self.composable:
            return False
        return text in self.library if self.method.ahead else self.library.key(text) in self.index

    def forget(self, texts: Iterable[str]) -> None:
        """Delete the KV of these chunks and all KV that was computed with them in its context.

        That includes the auxiliary model's KV, fused and harvested variants, and everything that prefix caching keeps
        of prompts; for all models in the store's folder, whichever documents the chunks belong to. It reads the header
        of every file of other models and encodings in the folder. It can be repeated after an interruption. Raises
        `StoreError` if something could not be removed; repeat it then.
        """
        self.corpus.forget(texts)

    def forget_document(self, *documents: str) -> None:
        """Delete the chunks that `ensure` stored for these documents, unless another document has them as well.

        For all models in the store's folder and at the remote. It reads the header of every file in the folder, and
        once of those at the remote. It can be repeated after an interruption. Raises `StoreError` if something could
        not be removed, for example because the remote is unreachable; repeat it then.
        """
        self.corpus.forget_document(*documents)

    def replace_document(
        self,
        document: str,
        texts: Iterable[str],
        progress: Callable[[int], None] | None = None,
        *,
        method: str | Method | None = None,
    ) -> Ensured:
        """Let a document have these chunks and no others: new ones are stored as by `ensure`, those that have vanished
        forgotten as by `forget_document`, unchanged ones kept.

        ``removed`` of the result says how many have vanished. It can be repeated after an interruption at any point,
        with the same chunks or others. Two at once for one document are to be avoided: it may end with chunks of both.
        Raises `StoreError` if the chunks cannot be noted as the document's, before anything is stored, or if something
        could not be removed; repeat it then. Raises `ConfigurationError` as `ensure` does.
        """
        return self.corpus.replace_document(document, texts, self.recipe(method), progress)

    def fuse(
        self,
        neighbours: Mapping[str, Sequence[str]],
        progress: Callable[[int], None] | None = None,
        *,
        method: str | Method | None = None,
        variants: int = 3,
    ) -> Ensured:
        """Store a fused variant of these chunks: KV computed behind each chunk's neighbours, which it is likely to
        follow in a prompt.

        ``neighbours``: by chunk text, the texts of its neighbours, the nearest first, as `corpus.neighbours.similar`
        returns them. Chunks and neighbours that `ensure` did not store are left out, so that fusing never brings back
        forgotten text. Variants that exist are not computed again, so it can be stopped and repeated, also after adding
        documents. ``variants``: how many are kept per chunk; the oldest are dropped. ``method`` says how chunks are
        encoded. Never raises for a chunk. Raises `ConfigurationError` unless ``neighbours`` maps texts to lists of
        texts. Source: FusionRAG (arXiv 2601.12904).
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
        """Store the KV that these chunks have in a prompt of this order: each one computed behind all those before it.

        A later prompt with the same sequence is answered as full prefill would, up to the text between chunks; one
        with most of the sequence, nearly so. Each sequence costs one prefill. The rest is as in `fuse`.
        """
        return self.fusing.fuse_in_order(sequences, self.recipe(method), progress, variants)

    def fuse_used(
        self, least: int = 2, count: int = 10, progress: Callable[[int], None] | None = None, **options: Any
    ) -> Ensured:
        """Fuse the chunks that occurred in at least ``least`` prompts, each with the ``count`` chunks most likely to
        precede it (`contexts`). ``options`` and the result are those of `fuse`.
        """
        return self.fuse(self.contexts(least, count), progress, **options)

    def contexts(self, least: int = 2, count: int = 10) -> dict[str, list[str]]:
        """The chunks that occurred in at least ``least`` prompts, each with the ``count`` chunks most likely to
        precede it, the likeliest first: what `fuse_used` fuses.
        """
        return self.fusing.contexts(least, count)

    def fused(self, text: str, method: str | Method | None = None) -> list[tuple[str, ...]]:
        """The contexts of this chunk's fused variants: for each, the texts it was computed behind, in order.

        ``method`` says how chunks are encoded.
        """
        return self.collections.of(self.recipe(method).encode).variants.held(text) if self.composable else []

    def hint(self, texts: Sequence[str], question: str | None = None, caller: Hashable = None) -> None:
        """Announce the chunks and the question of an upcoming prompt, as a retriever knows them.

        It starts loading their KV into memory, as the engine's method wants it for this order; it resolves ambiguities
        in recognition, and helps to find the question among the instructions: it counts only in a prompt with these
        chunks, and of the same ``caller`` (any hashable value, compared by equality; None: whom a `calling` block
        names, else all who have no name). Raises `ConfigurationError` for a single text instead of a list.
        """
        texts = list(require_list(texts))
        if self.composable:
            self._hints.note(question, frozenset(self.library.key(text) for text in texts), named(caller))
            self.prefiller.announce(texts, self.method)

    def library_of(self, method: str | Method) -> Library:
        """The library of the chunks that are encoded as ``method`` wants them."""
        return self.collections.of(self.recipe(method).encode).library

    def variants_of(self, method: str | Method, text: str) -> list[HarvestedVariant]:
        """The variants of a chunk that were taken from finished prompts; none unless ``method`` harvests prompts."""
        harvested = self.collections.of(self.recipe(method).encode).harvested
        return [] if harvested is None else harvested.of(self.library.key(text))

    def prefix_cache_of(self, method: str | Method) -> PrefixCache | None:
        """The prefix cache of a method that does prefix caching; None for other methods."""
        caching = self.recipe(method).prefix_cache
        return None if caching is None else self.collections.prefix_cache(caching)

    def recipe(self, method: str | Method | None = None) -> Method:
        """The `Method` that serves a request which names ``method``; None stands for the engine's own.

        Its chunks are encoded behind the engine's ``prefix``, if it was given one, unless the method names another.
        Its adapter is loaded, if it names one. Raises `ConfigurationError`.
        """
        if method is None:
            return self.method
        recipe = methods.with_prefix(method, self._prefix)
        _check_adapter(recipe)
        self.collections.backbone_of(recipe.encode)  # a wrong adapter is an error, not a failure in reuse
        return recipe

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
        caller: Hashable = None,
        **options: Any,
    ) -> TextStream:
        """Stream the answer to a prompt: an iterator of text deltas that carries ``ids`` and ``report``.

        The prefill runs at the first ``next``. Closing the iterator, from any thread, or setting ``cancel``, ends the
        request and frees its memory; so does an exception while a token is computed. ``question``: the question's text,
        if the caller knows it; ``caller``: whose hints count (see `hint`). ``max_new_tokens`` counts tokens of the
        answer. ``stop``: strings that end the answer and are not part of it. ``seed``: sample with a random generator
        of this request's own, whatever else is sampled meanwhile. ``options`` go to ``model.generate``
        (``temperature``, ``top_p``, ...); decoding is greedy unless a temperature above 0 or ``do_sample=True`` is
        given.

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
        request = PrefillRequest(prompt, chosen, ratio, max_new_tokens, question, self._hints, named(caller))
        tokens = self._then_notify(self.answering.tokens(request, options, report, ending), report)
        return TextStream(tokens, self.backbone.tokenizer, report, stop or (), ending)

    def prefill(
        self,
        prompt: str,
        *,
        question: str | None = None,
        method: str | Method | None = None,
        recompute_ratio: float | None = None,
        room: int = 256,
        caller: Hashable = None,
    ) -> Prefill:
        """Prefill without decoding: the prompt's KV on a canvas with ``room`` free slots (tokens), and the logits of
        its last token. Raises as `stream` does.
        """
        chosen, ratio = self._method_and_ratio(method, recompute_ratio)
        report = Report(chosen.name, ratio)
        start = time.perf_counter()
        _check_prompt(prompt)
        request = PrefillRequest(prompt, chosen, ratio, room, question, self._hints, named(caller))
        result = self.answering.prefill(request, report)
        report.ttft = report.total = time.perf_counter() - start
        return result

    def stats(self) -> Stats:
        """Counts since the engine was opened, and what its stores hold now. Cheap: reads no file."""
        stores = [each.library.store.stats() for each in self.collections]
        auxiliary = self.collections.auxiliary
        aside = [] if auxiliary is None else [auxiliary.store.stats()]
        memory = self.collections.memory_by_kind()
        in_flight, waiting, audit = self.limit.in_flight, self.limit.waiting, self.auditor.stats()
        return self._tally.snapshot(in_flight, waiting, total(stores, aside), memory, audit)

    def close(self) -> None:
        """Stop background work, after waiting for uploads.

        The engine can still answer prompts, and resumes background work when there is some.
        """
        self.auditor.close()
        self.corpus.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def after_fork(self) -> None:
        """In a forked process, whose only thread is the one that forked."""
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cacheclip-usage")

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
        """Options for `Backbone.generate`. A stop string that is a control token never occurs in the decoded text, so
        it becomes a token that ends the answer.
        """
        settled = decoding(options)
        self.backbone.check_options(settled, EFFECTIVE)
        if commands := {token for token in self.backbone.control_tokens if any(s.startswith(token) for s in stop)}:
            ids = self.backbone.tokenizer.convert_tokens_to_ids(sorted(commands))
            settled["eos_token_id"] = sorted(self.backbone.ends(settled.get("eos_token_id")).union(ids))
        return settled

    def _before(self) -> None:
        """Catch up with other processes' changes to the store."""
        try:
            self.corpus.follow()
        except Exception as error:  # the request can still be answered from what this process knows
            if raised_by_signal(error):
                raise
            log.exception("what other processes stored is not known")

    def _after(self, result: Prefill, request: PrefillRequest, reading: Reading) -> None:
        """Count which chunks were used together; queue missing chunks for encoding and others for fusing; audit."""
        report = result.report
        if self.usage.note(names := [use.key for use in report.chunks if use.key in self.index]):
            self._threads.submit(self.usage.save)
        if missing := [use.key for use in report.chunks if use.missing]:
            self.corpus.encode_again(missing, request.method)
        if self._fuse_when_idle and request.method.fit is not None:
            self.fusing.used_together(names, request.method)
        self.auditor.prefilled(result, request, reading)

    def _then_notify(self, tokens: Iterator[int], report: Report) -> Iterator[int]:
        """Yield ``tokens``; when they end, by whatever cause, count the request and notify the observers."""
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
            except Exception as error:  # an observer must not break an answer
                if raised_by_signal(error):
                    raise
                log.exception("an observer of requests failed")


def _check_auxiliary(method: Method, present: bool) -> None:
    if method.select.needs_auxiliary and not present:
        raise ConfigurationError(
            f'method "{method.name}" needs an auxiliary model: auxiliary="smollm2-135m-instruct", '
            'or choose method="query_guided"'
        )


def _check_adapter(method: Method) -> None:
    if method.prefix_cache is not None and getattr(method.encode, "adapter", None) is not None:
        raise ConfigurationError(f'method "{method.name}" takes no adapter: it keeps KV of the model itself')


def _check_prompt(prompt: Any) -> None:
    """Raises `PromptError` for a prompt that is not a string, and for an empty one."""
    if not isinstance(prompt, str):
        raise PromptError(
            f"a prompt is text, not {type(prompt).__name__}: engine.backbone.chat(messages) makes one of messages"
        )
    if not prompt:
        raise PromptError("the prompt is empty")


def _backbone(
    model: str | Path | Backbone,
    dtype: torch.dtype | str,
    device: str | torch.device,
    decode_weights: Format = "auto",
) -> Backbone:
    check_format(decode_weights)
    if not isinstance(model, Backbone):
        return open_backbone(model, dtype, device, decode_weights)
    if decode_weights != "auto" and model.decode_weights is None:
        raise ConfigurationError(
            f'this Backbone was loaded without 4-bit weights: Backbone.load(..., decode_weights="{decode_weights}")'
        )
    return model
