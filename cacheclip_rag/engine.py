"""The engine: prompt in, tokens and a report out. The only place where the rooms below are put together."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import methods, prefill, verified
from .auxiliary import Auxiliary
from .backbone import Backbone
from .background import Background
from .chunks import Namespace, canonical
from .decoding import TextStream
from .encode import Encoder, Harvested, Isolated
from .errors import CacheClipError, ConfigurationError, NotComposable, PromptError, StoreError
from .exact import ExactCache, ExactReuse
from .fusion import Usage
from .harvesting import Harvesting
from .library import KVDtype, Library
from .methods import Method
from .prefill import Prefill, Reuse
from .prompt import ChunkIndex
from .pull import resolve as resolve_weights
from .report import Report
from .select import Everything
from .store import ChunkStore, DiskStore, Documents, MemoryStore, Remote, RemoteStore, TieredStore
from .store.admin import Administration
from .turns import Seats, Turns

log = logging.getLogger("cacheclip_rag")

GIB = 1 << 30


_FUSED_AT = (2, 8, 32, 128, 512, 2048)
"""How often a chunk must have come in prompts to be fused in idle time, and then again: its company becomes clearer."""


class _Task(NamedTuple):
    """What is done when no request is being served: encode a chunk, or fuse it with those it was met with."""

    text: str
    method: Method | None = None
    fuse: bool = False


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


@dataclass
class Ensured:
    """What `Engine.ensure` did: keys of chunks whose KV is kept, how many were encoded now, what was left out."""

    keys: list[str] = field(default_factory=list)
    encoded: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """``(beginning of the text, reason)`` of chunks without KV; prompts with them are prefilled as usual."""


class Engine:
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

        ``method`` (see `methods.METHODS`; default ``"cacheclip"`` with an auxiliary model, else ``"query_guided"``) and
        ``recompute_ratio`` (0..1) can be overridden by each request. ``store``: the folder that keeps chunk KV; None
        keeps it in memory only. ``memory_bytes`` and ``disk_bytes`` cap the two tiers. ``prefix``: the text chunks are
        encoded behind, by default what precedes the user's text in the model's chat template. ``tenant`` separates
        chunk KV of different owners; set it from what you know of the caller, not from what the caller says. ``secret``
        keys the names of files and authenticates them, for a folder that others can write to. ``remote``: an fsspec url
        (``"s3://bucket/folder"``) or a `Remote`, asked for what is not here and given a copy of what is new.
        ``kv_dtype``: "int8" keeps chunk KV in half of bfloat16's bytes (docs/store.md says what that costs in quality).
        ``on_uncomposable``: what to do with a model whose KV cannot be moved: raise `NotComposable`, or serve it by
        plain prefill. ``fuse_when_idle``: while no request is being served, fuse chunks that come often with those they
        come with, for a method that takes fused variants. ``require_verified``: refuse a model that
        ``cacheclip verify`` has not found good on this machine with these libraries. ``max_requests``: how
        many may be in flight, each with the KV of its prompt in memory; others wait. A stream is in flight until it is
        read to its end or closed.

        Raises `ConfigurationError`, `NotComposable`, `WeightsError`, `StoreError`.
        """
        if method is None:
            method = "cacheclip" if auxiliary is not None else "query_guided"
        self.method = methods.resolve(method)
        if prefix is not None:
            self.method = methods.resolve(self.method, prefix=prefix)
        self.recompute_ratio = None if recompute_ratio is None else methods.check_ratio(recompute_ratio)
        self._check_auxiliary(self.method, auxiliary is not None)
        if kv_dtype not in get_args(KVDtype):
            raise ConfigurationError(f'kv_dtype must be "auto" or "int8", not {kv_dtype!r}')
        self._kv_dtype: KVDtype = kv_dtype
        if max_requests < 1:
            raise ConfigurationError(f"max_requests must be at least 1, not {max_requests}")
        self._store_folder, self._memory_bytes, self._disk_bytes = store, memory_bytes, disk_bytes
        self.backbone = _backbone(model, dtype, device)
        if self.backbone.obstacle is not None and on_uncomposable == "error":
            raise NotComposable(f'{self.backbone.obstacle}; on_uncomposable="prefill" serves it without reuse')
        self.composable = self.backbone.obstacle is None
        self.index = ChunkIndex()
        self._tenant = tenant
        self._secret = secret.encode() if isinstance(secret, str) else secret
        self._remote = Remote(remote) if isinstance(remote, str) else remote
        self.documents = Documents(store, tenant, self._secret)
        """Which chunks are of which document."""
        self._uploading: list[RemoteStore] = []
        self.auxiliary: Auxiliary | None = None
        self._rooms: dict[Encoder, Reuse] = {}
        self._exact: dict[ExactReuse, ExactCache] = {}
        self._rooms_lock = threading.Lock()
        if self.composable:
            self.library = self._library(self.backbone, self.method.encode)
            if require_verified:
                name = str(self.backbone.model.name_or_path if isinstance(model, Backbone) else model)
                verified.require(verified.identity(self.library.namespace.fields, self.backbone), name)
            self._room(self.method)
            if auxiliary is not None:
                self.auxiliary = self.open_auxiliary(auxiliary, dtype, device, prefix)
        self.usage = Usage(self._usage_file())
        self._fuse_when_idle = fuse_when_idle
        self._turns, self._seats = Turns(), Seats(max_requests)
        self._hints: OrderedDict[tuple[str, frozenset[str]], None] = OrderedDict()
        self._hints_lock = threading.Lock()
        self._background = Background(self._do_later)
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cacheclip-loader")
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
        return Auxiliary(self._library(_backbone(model, dtype, device), Isolated(prefix)))

    def library_of(self, method: str | Method) -> Library:
        """Where the chunks are kept that are encoded as ``method`` wants them."""
        return self._room(methods.resolve(method)).library

    # ---- ingestion ------------------------------------------------------------------------------------------------

    def ensure(
        self,
        texts: Iterable[str],
        progress: Callable[[int], None] | None = None,
        *,
        method: str | Method | None = None,
        document: str | None = None,
    ) -> Ensured:
        """Keep the KV of these chunks: encode what is missing, leave what is there.

        Encoded as the engine's method wants it, or as ``method`` does. Never raises for a chunk: one that cannot be
        encoded or kept is listed with the reason, and prompts that contain it are prefilled as usual. Interrupting it
        loses nothing that was finished. ``progress(done)`` is called after each chunk. ``document``: what they are
        chunks of, for `forget_document`.
        """
        result = Ensured()
        if document is not None:
            texts = list(texts)
            try:
                self.documents.add(document, texts)
            except StoreError as error:  # what is stored now could not be forgotten with its document
                result.skipped += [(text[:40], str(error)) for text in texts]
                return result
        chosen = self.method if method is None else methods.resolve(method)
        for done, text in enumerate(texts, start=1):
            try:
                if not self.composable:
                    result.skipped.append((text[:40], f"{self.backbone.obstacle}"))
                elif chosen.ahead:
                    self._ensure(text, self._room(chosen).library, result)
                else:  # nothing to compute before the first prompt, but to be recognised there
                    self.index.add(self.library.key(text), text)
                    result.keys.append(self.library.key(text))
            except (CacheClipError, RuntimeError, MemoryError, OSError) as error:
                log.warning("chunk not encoded: %s", error)
                result.skipped.append((text[:40], str(error)))
            if progress is not None:
                progress(done)
        return result

    def _ensure(self, text: str, library: Library, result: Ensured) -> None:
        key, name = library.key(text), self.library.key(text)
        if self.index.text(name) is not None and key in library.store:
            self._ensure_auxiliary(text)
            result.keys.append(key)
            return
        with self._turns:
            chunk = library.ensure(text)
        self._ensure_auxiliary(text)
        if key in library.store:
            self.index.add(name, chunk.text)
            result.keys.append(key)
            result.encoded += 1
        else:
            result.skipped.append((text[:40], "the store did not keep it"))

    def fuse(
        self,
        neighbours: Mapping[str, Sequence[str]],
        progress: Callable[[int], None] | None = None,
        *,
        method: str | Method | None = None,
        variants: int = 3,
    ) -> Ensured:
        """Keep another KV of these chunks: each computed behind its neighbours, the chunks it is likely to meet.

        ``neighbours``: texts by text, the nearest first, as `fusion.similar` finds them. Chunks and neighbours that
        `ensure` was not asked for are left out, so that fusing brings back nothing that was forgotten. What is there is
        not computed again: stop it whenever you like and call it again, after adding documents, too. Of more than so
        many ``variants`` of a chunk the oldest are dropped. ``method`` says how chunks are encoded. Never raises for a
        chunk.
        """
        result = Ensured()
        chosen = self.method if method is None else methods.resolve(method)
        for done, (text, company) in enumerate(neighbours.items(), start=1):
            try:
                if not (self.composable and chosen.ahead):
                    result.skipped.append((text[:40], self.backbone.obstacle or f"{chosen.name} encodes nothing ahead"))
                else:
                    self._fuse(text, company, self._room(chosen), variants, result)
            except (CacheClipError, RuntimeError, MemoryError, OSError) as error:
                log.warning("chunk not fused: %s", error)
                result.skipped.append((text[:40], str(error)))
            if progress is not None:
                progress(done)
        return result

    def fuse_in_order(
        self, sequences: Iterable[Sequence[str]], *, method: str | Method | None = None, variants: int = 3
    ) -> Ensured:
        """Keep the KV that prompts of these chunks, in this order, would leave: each chunk behind all those before it.

        A prompt that holds such a sequence again is answered as full prefill answers it, up to the text between chunks;
        one that holds most of it, nearly so. Each sequence costs what prefilling it costs. The rest is as in `fuse`.
        """
        result = Ensured()
        chosen = self.method if method is None else methods.resolve(method)
        for texts in sequences:
            try:
                with self._turns:
                    known = [text for text in texts if self.library.key(text) in self.index]
                    room = self._room(chosen)
                    result.encoded += room.fused.fuse_in_order(known, variants)
                    result.keys += [room.library.key(text) for text in known]
                    result.skipped += [
                        (t[:40], "the chunk is not known: ensure it first") for t in texts if t not in known
                    ]
            except (CacheClipError, RuntimeError, MemoryError, OSError) as error:
                log.warning("sequence not fused: %s", error)
                result.skipped.append((texts[0][:40], str(error)))
        return result

    def fuse_used(
        self, least: int = 2, count: int = 10, progress: Callable[[int], None] | None = None, **options: Any
    ) -> Ensured:
        """Fuse the chunks that came in ``least`` prompts or more, each with the ``count`` others that stood in front of
        it most often, the most frequent first. ``options`` are those of `fuse`, and so is the rest.
        """
        neighbours = {}
        for name in self.usage.hot(least):
            texts = [self.index.text(other) for other in (name, *self.usage.company(name, count))]
            if texts[0] is not None and (company := [text for text in texts[1:] if text is not None]):
                neighbours[texts[0]] = company
        return self.fuse(neighbours, progress, **options)

    def _fuse(self, text: str, company: Sequence[str], room: Reuse, keep: int, result: Ensured) -> None:
        with self._turns:  # nothing of the company can be forgotten meanwhile
            if self.library.key(text) not in self.index:
                result.skipped.append((text[:40], "the chunk is not known: ensure it first"))
                return
            known = [other for other in company if self.library.key(other) in self.index]
            result.encoded += room.fused.fuse(text, known, keep)
            result.keys.append(room.library.key(text))

    def ensure_later(self, texts: Iterable[str]) -> None:
        """Like `ensure`, in the background, while no request is being served."""
        if self.composable:
            self._background.add(_Task(text) for text in texts)

    def flush(self) -> None:
        """Wait until everything asked of `ensure_later` is done, and is at the remote store if there is one."""
        self._background.flush()
        self.usage.save()
        for store in self._uploading:
            store.flush()

    def forget(self, texts: Iterable[str]) -> None:
        """Drop the KV of these chunks, whatever was computed in their company, the auxiliary model's included, and all
        that exact reuse keeps of prompts; whichever documents have them.
        """
        if gone := list(texts):
            self._forget(gone)
            self.documents.drop(gone)

    def forget_document(self, *documents: str) -> None:
        """Drop what `ensure` kept of these documents, for all models in the store's folder; chunks that another
        document has as well stay.

        It reads the beginning of every file in the folder. Interrupted, it can be repeated. Raises `StoreError` when
        something cannot be removed.
        """
        if wanted := self.documents.only(documents):
            known = map(self.index.text, self.index.keys())
            self._forget([text for text in known if text is not None and self.documents.text(text) in wanted])
        if self._store_folder is not None:
            Administration(self._store_folder).forget_documents(documents, self._tenant, self._secret)
        else:
            self.documents.remove(documents)

    def _forget(self, gone: Sequence[str]) -> None:
        if not self.composable:
            return
        unwanted = {canonical(text) for text in gone}
        self._background.drop(lambda task: canonical(task[0]) in unwanted)
        with self._turns:  # a prompt on its way would leave behind what it harvests
            self._exact.clear()
            self.usage.forget([self.library.key(text) for text in gone])
            for text in gone:
                name = self.library.key(text)
                self.index.remove(name)
                for room in self._opened():
                    room.forget(text, name)
                if self.auxiliary is not None:
                    self.auxiliary.library.store.delete([self.auxiliary.library.key(text)])
            for room in self._opened():
                room.library.forget(unwanted)
                room.fused.refresh()

    def knows(self, text: str) -> bool:
        """Whether the KV of this chunk is kept."""
        if not self.composable:
            return False
        return text in self.library if self.method.ahead else self.library.key(text) in self.index

    def hint(self, texts: Sequence[str], question: str | None = None) -> None:
        """Advice from a retriever: these chunks and this question are about to come in a prompt.

        Starts loading their KV into memory, settles ties in recognition, and tells the question from the instructions
        around it. Wrong or missing advice costs nothing but time.
        """
        if not self.composable:
            return
        keys = frozenset(self.library.key(text) for text in texts)
        with self._hints_lock:
            self._hints[(question or "", keys)] = None
            self._hints.move_to_end((question or "", keys))
            while len(self._hints) > 256:
                self._hints.popitem(last=False)
        self._threads.submit(lambda: [self.library.get(key) for key in keys])

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

        Raises `PromptError` and `ConfigurationError` at once, not at the first ``next``.
        """
        chosen, ratio = self._recipe(method, recompute_ratio)
        if max_new_tokens < 1:
            raise ConfigurationError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        if isinstance(stop, str):
            stop = [stop]
        if not prompt:
            raise PromptError("the prompt is empty")
        if options.get("temperature") and "do_sample" not in options:
            options["do_sample"] = True
        if options.get("do_sample") and options.get("temperature") == 0:
            raise ConfigurationError("do_sample=True needs a temperature above 0; greedy decoding is do_sample=False")
        if not options.setdefault("do_sample", False):
            options.update(temperature=None, top_p=None, top_k=None)
        report = Report(chosen.name, ratio)

        def run() -> Iterator[int]:
            start = time.perf_counter()
            seated = False
            try:
                seated = self._seats.take(cancel)
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
                for token in steps:
                    if not report.completion_tokens:
                        report.ttft = time.perf_counter() - start
                    report.completion_tokens += 1
                    yield token
                    if cancel is not None and cancel.is_set():
                        report.finish_reason = "cancelled"
                        break
                else:
                    report.finish_reason = "length" if report.completion_tokens >= length else "stop"
            except _Cancelled:
                return
            except Exception:
                report.finish_reason = "error"
                raise
            finally:
                if seated:
                    self._seats.give()
                report.finish_reason = report.finish_reason or "cancelled"
                report.total = time.perf_counter() - start
                self.last_report = report
                self._tell(report)

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

    def close(self) -> None:
        """Stop background work, but for uploads, which are waited for. The engine goes on answering."""
        self._background.close()
        self.usage.save()
        for store in self._uploading:
            store.flush()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _recipe(self, method: str | Method | None, ratio: float | None) -> tuple[Method, float]:
        chosen = self.method if method is None else methods.resolve(method)
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
        if not prompt:
            raise PromptError("the prompt is empty")
        with self._turns:
            if cancel is not None and cancel.is_set():
                raise _Cancelled  # while it waited for its turn
            if not self.composable:
                report.fallbacks.append(f"plain prefill: {self.backbone.obstacle}")
                return prefill.native(self.backbone, prompt, report)
            self._follow_store()
            if method.exact is None and (isinstance(method.select, Everything) or ratio >= 1.0):
                return prefill.full(self.backbone, self.index, prompt, room, report)
            hints, announced = self._hinted(prompt)
            try:
                if method.exact is not None:
                    if method.exact not in self._exact:
                        self._exact[method.exact] = method.exact.open()
                    cache = self._exact[method.exact]
                    return prefill.exact(self.backbone, self.index, cache, prompt, room, report)
                result = self._room(method)(
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
                return prefill.full(self.backbone, self.index, prompt, room, report)
        if self.usage.note(names := [use.key for use in report.chunks]):
            self._threads.submit(self.usage.save)
        if self._fuse_when_idle and method.fit is not None:
            due = [self.index.text(name) for name in names if self.usage.uses(name) in _FUSED_AT]
            self._background.add(_Task(text, method, fuse=True) for text in due if text is not None)
        gone = [text for use in report.chunks if use.missing and (text := self.index.text(use.key)) is not None]
        if gone:
            self._background.add(_Task(text, method) for text in gone)
        return result

    def _hinted(self, prompt: str) -> tuple[frozenset[str], str | None]:
        """Keys of recently announced chunks, and the newest announced question that stands in this prompt."""
        with self._hints_lock:
            hints = list(reversed(self._hints))
        keys = frozenset().union(*(keys for _, keys in hints[:8])) if hints else frozenset()
        return keys, next((question for question, _ in hints if question and question in prompt), None)

    def _follow_store(self) -> None:
        for room in self._opened():
            if room.library.store.refresh():
                room.fused.refresh()
                self._know(room.library)

    def _know(self, library: Library) -> None:
        """Recognise in prompts what this library has. One index serves all: a chunk's name is its text's."""
        for entry in library.store.entries():
            self.index.add(self.library.key(entry.text), entry.text)

    def _room(self, method: Method) -> Reuse:
        """Reuse of chunks encoded as this method wants them; other encodings are other chunks."""
        with self._rooms_lock:
            if method.encode not in self._rooms:
                own = method.encode == self.library.encoder
                library = self.library if own else self._library(self.backbone, method.encode)
                self._rooms[method.encode] = (
                    Harvesting(library, self.index, method.encode)
                    if isinstance(method.encode, Harvested)
                    else Reuse(library, self.index)
                )
                self._know(library)
            return self._rooms[method.encode]

    def _opened(self) -> list[Reuse]:
        with self._rooms_lock:
            return list(self._rooms.values())

    def _tell(self, report: Report) -> None:
        log.info("%s", report.line)
        for observer in self.observers:
            try:
                observer(report)
            except Exception:  # who watches must not break an answer
                log.exception("an observer of requests failed")

    def _in_turn(self, step: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
        def turn(token: Tensor, row: int) -> Tensor:
            with self._turns:
                return step(token, row)

        return turn

    def _usage_file(self) -> Path | None:
        if self._store_folder is None or not self.composable:
            return None
        return Path(self._store_folder).expanduser() / f"usage-{self.library.namespace.digest[:32]}.json"

    def _library(self, backbone: Backbone, encoder: Encoder) -> Library:
        return Library(backbone, encoder, self._open_store, self._tenant, self._secret, self._kv_dtype)

    def _open_store(self, namespace: Namespace) -> ChunkStore:
        memory = MemoryStore(self._memory_bytes)
        if self._store_folder is None and self._remote is None:
            return memory
        tiers: list[ChunkStore] = [memory]
        if self._store_folder is not None:
            tiers.append(DiskStore(self._store_folder, namespace, self._disk_bytes))
        if self._remote is None:
            return TieredStore(*tiers)
        self._uploading.append(RemoteStore(self._remote, namespace))
        return TieredStore(*tiers, remote=self._uploading[-1])

    def _ensure_auxiliary(self, text: str) -> None:
        if self.auxiliary is not None and text not in self.auxiliary.library:
            with self._turns:
                self.auxiliary.ensure(text)

    def _do_later(self, task: _Task) -> None:
        patience = time.monotonic() + 10.0  # requests go first, but one that was left open must not hold this up
        while self._seats.taken and time.monotonic() < patience:
            time.sleep(0.02)
        if task.fuse:
            met = map(self.index.text, self.usage.company(self.library.key(task.text), 10))
            self.fuse({task.text: [text for text in met if text is not None]}, method=task.method)
        else:
            self.ensure([task.text], method=task.method)


def _backbone(model: str | Path | Backbone, dtype: torch.dtype | str, device: str | torch.device) -> Backbone:
    return (
        model if isinstance(model, Backbone) else Backbone.load(resolve_weights(str(model)), dtype=dtype, device=device)
    )
