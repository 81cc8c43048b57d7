"""Where the KV of chunks is kept: in an engine of this process, or on a server."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from .fuser import Fuser

log = logging.getLogger("cacheclip_rag")

OnMiss: TypeAlias = Literal["background", "encode", "ignore"]
"""Retrieved chunks without KV: encode them after the answer, before it, or not at all."""

Part = tuple[str | None, str]
"""A document's name, where it is known, and the text of one of its chunks."""


class ChunkKV(Protocol):
    """The KV of chunks, as ingestion and retrieval see it. Methods raise what the engine or the server does."""

    @property
    def fingerprint(self) -> str:
        """Identifies all KV that an ingestion makes, for caches of ingestion steps."""
        ...

    def encode(
        self,
        parts: Sequence[Part],
        *,
        fuser: Fuser | None = None,
        show_progress: bool = True,
        replaced: Collection[str] = (),
    ) -> int:
        """Keep the KV of these chunks, beside what their documents have; those named in ``replaced`` were deleted just
        now, and have no others. How many were encoded now.
        """
        ...

    def fuse(self, fuser: Fuser, show_progress: bool = True) -> None:
        """Fuse what is kept with what it resembles."""
        ...

    def ingested(
        self,
        source: str,
        parts: Sequence[Part],
        *,
        fuser: Fuser | None = None,
        vectors: Mapping[str, Any] | None = None,
        show_progress: bool = True,
    ) -> None:
        """Encode what an ingestion step was given: all chunks that these documents have now. Deletions it is not told
        of: what a document had at an earlier call with this ``source``, and no document has now, is forgotten.

        ``vectors``: for the ``fuser``, embeddings that are there already, by text.
        """
        ...

    def noted(self, documents: Iterable[str]) -> list[Part]:
        """The chunks of these documents, as far as they can be told without being asked of anybody else."""
        ...

    def forget(self, left: Sequence[Part], unused: Collection[str], documents: Collection[str] = ()) -> None:
        """``left``: chunks that are no part of these documents any longer; ``unused``: those texts, of these or of
        chunks without a document, that nothing here holds; ``documents``: all of each is gone. What another document
        has stays.
        """
        ...

    def warm(self, texts: Iterable[str], question: str | None, on_miss: OnMiss) -> None:
        """Which chunks and which question are coming; see to chunks without KV."""
        ...


class Handle(ABC):
    """A reference to what keeps the KV of a framework's model and answers; it can be copied and pickled."""

    travelled = False
    """Whether it came to where it is by pickle."""

    @property
    @abstractmethod
    def kv(self) -> ChunkKV:
        """Opened now if need be."""

    @abstractmethod
    def peek_kv(self) -> ChunkKV | None:
        """As `kv`, but None where something would have to be opened first."""

    @abstractmethod
    def check_fusing(self, count: int) -> None:
        """Raises `ConfigurationError` where chunks cannot be fused by whoever ingests them (``fuse=count``)."""


def prepare_retrieved(handle: Handle, texts: Iterable[str], question: str | None, on_miss: OnMiss) -> None:
    """As `ChunkKV.warm`, between a retriever and a model that answers without it, too, only later: never raises."""
    try:
        handle.kv.warm(texts, question or None, on_miss)
    except Exception:
        log.exception("retrieved chunks not prepared; the model prefills what it finds no KV for")
