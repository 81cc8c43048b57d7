"""Chunks on a server: the documents they belong to are its documents."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from tqdm.auto import tqdm

from ...chunks import MIN_CHARS, canonical
from ...errors import ConfigurationError
from ...frameworks import Fuser, OnMiss, Part
from ..client import ChunkClient
from ..service import Added

log = logging.getLogger("cacheclip_rag")

_AT_ONCE = 8
"""Requests that are sent at the same time: one names one document, and a server encodes several chunks in a pass."""

Server = tuple[str, str | None]
"""Address and key."""

_ingested: dict[Server, dict[str, dict[str, list[str]]]] = {}
"""By server, document and source, the texts it had at its latest ingestion."""
_lock = threading.Lock()


class ServerKV:
    """The `ChunkKV` of a server. Methods raise `ServerError`."""

    def __init__(self, client: ChunkClient, server: Server) -> None:
        self._client, self._server = client, server

    @property
    def fingerprint(self) -> str:
        """The server and its model; the same documents are given to another server again."""
        models = self._client.models()
        return f"{self._server[0]} {models[0]['id'] if models else ''}"

    def encode(
        self,
        parts: Sequence[Part],
        *,
        fuser: Fuser | None = None,
        show_progress: bool = True,
        replaced: Collection[str] = (),
    ) -> int:
        requests: list[tuple[int, Callable[[], Added]]] = []
        for document, texts in _by_document(parts).items():
            if document is not None and document in replaced:  # what it had before, this process need not know
                requests.append((len(texts), self._replacing(document, texts)))
            else:
                requests.append((len(texts), self._adding(document, texts)))
        return _sent(requests, show_progress)

    def fuse(self, fuser: Fuser, show_progress: bool = True) -> None:
        raise ConfigurationError("chunks of a server cannot be fused from here: leave fuse out")

    def ingested(
        self,
        source: str,
        parts: Sequence[Part],
        *,
        fuser: Fuser | None = None,
        vectors: Mapping[str, Any] | None = None,
        show_progress: bool = True,
    ) -> None:
        """A document then has, on the server, what it has by all sources that this process has heard of."""
        given = _by_document(parts)
        requests: list[tuple[int, Callable[[], Added]]] = []
        if without := given.pop(None, None):
            requests.append((len(without), self._adding(None, without)))
        for document, texts in given.items():
            assert document is not None
            with _lock:
                known = _ingested.setdefault(self._server, {}).setdefault(document, {})
                known[source] = texts
                everything = list(dict.fromkeys(text for own in known.values() for text in own))
            requests.append((len(everything), self._replacing(document, everything)))
        _sent(requests, show_progress)

    def noted(self, documents: Iterable[str]) -> list[Part]:
        return []

    def forget(self, left: Sequence[Part], unused: Collection[str], documents: Collection[str] = ()) -> None:
        # One after another: at the end of a process no threads can be started any more.
        parts = _by_document(left)
        for document, texts in parts.items():
            if document is not None and document not in documents:
                self._client.forget(texts, document)
        of_documents = {canonical(text) for _, text in left}
        if alone := [text for text in unused if canonical(text) not in of_documents]:
            self._client.forget(alone)
        for document in documents:
            self._client.forget_document(document)

    def warm(self, texts: Iterable[str], question: str | None, on_miss: OnMiss) -> None:
        """A server loads what a prompt needs when it comes. What it has no KV of is only sent with ``"encode"``."""
        texts = [text for text in dict.fromkeys(texts) if len(canonical(text)) >= MIN_CHARS]
        if texts and on_miss == "encode":
            self._client.add(texts)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _adding(self, document: str | None, texts: Sequence[str]) -> Callable[[], Added]:
        return lambda: self._client.add(texts, document)

    def _replacing(self, document: str, texts: Sequence[str]) -> Callable[[], Added]:
        return lambda: self._client.replace(document, texts)


def _by_document(parts: Iterable[Part]) -> dict[str | None, list[str]]:
    """The texts of each document, each once."""
    found: dict[str | None, dict[str, None]] = {}
    for document, text in parts:
        found.setdefault(document, {})[text] = None
    return {document: list(texts) for document, texts in found.items()}


def _sent(requests: Sequence[tuple[int, Callable[[], Added]]], show_progress: bool) -> int:
    """Send these requests, each about so many chunks. How many were encoded now. The first failure ends it."""
    total, done = sum(count for count, _ in requests), Added()
    bar = tqdm(total=total, desc="KV of chunks", unit="chunk", delay=1, disable=not show_progress)
    pool = ThreadPoolExecutor(max_workers=_AT_ONCE, thread_name_prefix="cacheclip-ingest")
    try:
        with bar:
            futures = {pool.submit(send): count for count, send in requests}
            for future in as_completed(futures):
                added = future.result()
                done = Added(done.encoded + added.encoded, done.kept + added.kept, done.skipped + added.skipped)
                bar.update(futures[future])
    finally:
        pool.shutdown(cancel_futures=True)
    log.info("%d of %d chunks encoded now by the server, %d left out", done.encoded, total, len(done.skipped))
    for one in done.skipped:  # no text is logged
        log.debug("no KV of a chunk: %s", one.reason)
    return done.encoded
