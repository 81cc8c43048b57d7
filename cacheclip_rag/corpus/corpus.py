"""The chunks an engine knows: encoded, fused, kept, found again and forgotten."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..chunks import canonical
from ..errors import CacheClipError, StoreError
from ..kv.encode import HarvestedVariant
from ..kv.library import Library
from ..kv.prefix_caching import PrefixCache
from ..methods import Method
from ..methods.auxiliary import Auxiliary
from ..prefill.harvest import Harvesting
from ..serving.hints import Hints
from ..serving.limit import RequestLimit
from ..store import Documents, Place
from .batches import batch_characters, batches, with_progress
from .fusing import Ensured, Fusing, Task, require_list

log = logging.getLogger("cacheclip_rag")

_NOT_KEPT = "the store did not keep it"


class Ingestion(Fusing):
    """The half of an `Engine` that looks after chunks."""

    composable: bool
    auxiliary: Auxiliary | None
    documents: Documents
    _place: Place
    limit: RequestLimit
    _hints: Hints
    _threads: ThreadPoolExecutor

    def library_of(self, method: str | Method) -> Library:
        """Where the chunks are kept that are encoded as ``method`` wants them."""
        return self._encodings.reuse(self.recipe(method).encode).library

    def variants_of(self, method: str | Method, text: str) -> list[HarvestedVariant]:
        """What finished prompts left of a chunk, for a method that harvests them; for another nothing."""
        reuse = self._encodings.reuse(self.recipe(method).encode)
        return reuse.variants.of(self.library.key(text)) if isinstance(reuse, Harvesting) else []

    def prefix_cache_of(self, method: str | Method) -> PrefixCache | None:
        """What a method that reuses prompts' beginnings only has kept of them; None for another method."""
        exact = self.recipe(method).prefix_cache
        if exact is not None and exact not in self._exact:
            self._exact[exact] = exact.open()
        return None if exact is None else self._exact[exact]

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

        Encoded as the engine's method wants it, or as ``method`` does; short chunks together, as many as keep the
        processor busy. Never raises for a chunk: one that cannot be encoded or kept is listed with the reason, and
        prompts that contain it are prefilled as usual. Interrupting it loses nothing that was finished.
        ``progress(done)`` is called for each chunk. ``document``: what they are chunks of, for `forget_document`.

        Raises `ConfigurationError` for one text instead of several, and for an unknown method.
        """
        result, texts = Ensured(), require_list(texts)
        if document is not None:
            texts = list(texts)
            try:
                self.documents.add(document, texts)
            except StoreError as error:  # what is stored now could not be forgotten with its document
                result.skipped += [(text[:40], str(error)) for text in texts]
                return result
        chosen = self.recipe(method)
        for batch in with_progress(batches(texts, batch_characters(self.backbone.device)), progress):
            self._ensure_batch(batch, chosen, result)
        return result

    def _ensure_batch(
        self, texts: Sequence[str], method: Method, result: Ensured, wanted: Callable[[], bool] = lambda: True
    ) -> None:
        try:
            if not self.composable:
                for text in texts:  # a control token in a document is text, whoever prefills it
                    self.index.add(canonical(text), canonical(text))
                result.skipped += [(text[:40], f"{self.backbone.obstacle}") for text in texts]
            elif method.ahead:
                self._ensure(texts, self._encodings.reuse(method.encode).library, result, wanted)
            else:  # nothing to compute before the first prompt, but to be recognised there
                for text in texts:
                    self.index.add(self.library.key(text), text)
                    result.keys.append(self.library.key(text))
        except (CacheClipError, RuntimeError, MemoryError, OSError) as error:
            log.warning("%d chunks not encoded: %s", len(texts), error)
            result.skipped += [(text[:40], str(error)) for text in texts]

    def _ensure(
        self, texts: Sequence[str], library: Library, result: Ensured, wanted: Callable[[], bool] = lambda: True
    ) -> None:
        """``wanted`` is asked once it is this call's turn: what was forgotten meanwhile must not come back."""
        keys = [library.key(text) for text in texts]
        if all(self._settled(key, text, library) for key, text in zip(keys, texts, strict=True)):
            result.keys += keys
            return
        with self.lock:  # nothing of it can be forgotten meanwhile
            if not wanted():
                return
            missing = {
                key: text
                for key, text in zip(keys, texts, strict=True)
                if not self._held(key, text, library) and library.get(key) is None
            }
            made = dict(zip(missing, library.ensure_each(list(missing.values())), strict=True))
            refused = {key: str(chunk) for key, chunk in made.items() if isinstance(chunk, Exception)}
            refused |= {key: _NOT_KEPT for key in made if key not in refused and not library.keeps(key)}
            # What a full disk refuses may still be in memory, and serve prompts as long as this process lives.
            kept = {t: k for k, t in zip(keys, texts, strict=True) if k not in refused or k in library.store}
            for text in kept:
                self.index.add(self.library.key(text), canonical(text))
            if self.auxiliary is not None:  # a chunk that it cannot take is scored 0 later
                other = self.auxiliary.library
                other.ensure_each([text for text in kept if text not in other])
        for key, text in zip(keys, texts, strict=True):
            if key in refused:
                log.warning("chunk not encoded: %s", refused[key])
                result.skipped.append((text[:40], refused[key]))
            else:
                result.keys.append(key)
        result.encoded += len(made) - len(refused)

    def _settled(self, key: str, text: str, library: Library) -> bool:
        """Whether there is nothing left to do for this chunk, so that no turn need be waited for."""
        return self._held(key, text, library) and (self.auxiliary is None or text in self.auxiliary.library)

    def _held(self, key: str, text: str, library: Library) -> bool:
        return self.index.text(self.library.key(text)) is not None and key in library.store

    def ensure_later(self, texts: Iterable[str]) -> None:
        """Like `ensure`, in the background, while no request is being served."""
        texts = require_list(texts)
        if self.composable:
            self._background.add(Task(text) for text in texts)

    def flush(self) -> None:
        """Wait until everything asked of `ensure_later` is done, and is at the remote store if there is one."""
        self._background.flush()
        self.usage.save()
        self._place.settle()

    def forget(self, texts: Iterable[str]) -> None:
        """Drop the KV of these chunks, whatever was computed behind them, the auxiliary model's included, and all
        that exact reuse keeps of prompts; whichever documents have them, for all models in the store's folder.

        It reads the beginning of every file of other models and encodings in the folder. Interrupted, it can be
        repeated. Raises `StoreError` when something cannot be removed: repeat it then.
        """
        if gone := list(require_list(texts)):
            self._forget(gone)
            opened = [library.namespace for library in self._libraries()]
            self._place.forget_elsewhere(set(map(self.documents.text, gone)), opened)
            self.documents.drop(gone)

    def forget_document(self, *documents: str) -> None:
        """Drop what `ensure` kept of these documents, for all models in the store's folder and at the remote; chunks
        that another document has as well stay.

        It reads the beginning of every file in the folder, and once of those at the remote. Interrupted, it can be
        repeated. Raises `StoreError` when something cannot be removed, a remote that is away included: repeat it then.
        """
        if wanted := self.documents.only(documents):
            self._forget([text for text in self.index.texts() if self.documents.text(text) in wanted])
            self._place.forget_everywhere(wanted)
        self.documents.remove(documents)

    def _forget(self, gone: Sequence[str]) -> None:
        unwanted = {canonical(text) for text in gone}
        if not self.composable:
            for text in unwanted:
                self.index.remove(text)
            return
        self._background.drop(lambda task: canonical(task[0]) in unwanted)
        with self.lock:  # a prompt on its way would leave behind what it harvests
            self._exact.clear()
            self.usage.forget([self.library.key(text) for text in gone])
            try:
                if self.auxiliary is not None:
                    self.auxiliary.library.forget(unwanted)
            finally:
                self._encodings.forget(gone, unwanted)

    def knows(self, text: str) -> bool:
        """Whether the KV of this chunk is kept."""
        if not self.composable:
            return False
        return text in self.library if self.method.ahead else self.library.key(text) in self.index

    def hint(self, texts: Sequence[str], question: str | None = None) -> None:
        """Advice from a retriever: these chunks and this question are about to come in a prompt.

        Starts loading their KV into memory, settles ties in recognition, and tells the question from the instructions
        around it. Wrong or missing advice costs nothing but time. Raises `ConfigurationError` for one text instead of
        several.
        """
        texts = list(require_list(texts))
        if not self.composable:
            return
        keys = frozenset(self.library.key(text) for text in texts)
        self._hints.note(question, keys)
        self._threads.submit(lambda: [self.library.get(key) for key in keys])

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _libraries(self) -> list[Library]:
        """All that this engine has opened."""
        aside = [] if self.auxiliary is None else [self.auxiliary.library]
        return [reuse.library for reuse in self._encodings] + aside

    def _do_later(self, task: Task) -> None:
        patience = time.monotonic() + 10.0  # requests go first, but one that was left open must not hold this up
        while self.limit.in_flight and time.monotonic() < patience:
            time.sleep(0.02)
        if task.fuse:
            met = map(self.index.text, self.usage.expected_context(self.library.key(task.text), 10))
            self.fuse({task.text: [text for text in met if text is not None]}, method=task.method)
        else:
            self._ensure_batch([task.text], task.method or self.method, Ensured(), wanted=self._background.wanted)
