"""What an engine offers over HTTP: the chunks of tenants and their documents, added, replaced and forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import CacheClipError


class TenantRefused(CacheClipError):
    """This engine has no place for this tenant."""


@dataclass(frozen=True)
class Skipped:
    """A chunk without KV: its place among the texts of the request, and why. Prompts with it are prefilled as usual."""

    index: int
    reason: str


@dataclass(frozen=True)
class Added:
    """How many chunks were encoded now, how many were stored before, and which have no KV. Texts that a request holds
    twice count once.
    """

    encoded: int = 0
    kept: int = 0
    skipped: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True)
class Replaced(Added):
    """As `Added`; ``removed``: how many chunks the document no longer has."""

    removed: int = 0


@dataclass(frozen=True)
class ChunkStats:
    """A tenant's chunks. ``fused``: how many of the stored ones were computed behind other chunks; ``bytes``: what all
    take. The others are counts since the server was started.
    """

    chunks: int = 0
    fused: int = 0
    bytes: int = 0
    hits: int = 0
    misses: int = 0
    evicted: int = 0


class ChunkService(Protocol):
    """The chunks of an engine. ``tenant`` is who the operator's key belongs to, "" where there are no keys.

    Methods may be called at the same time; calls for one document of a tenant come one after another. They raise
    `ConfigurationError` and `PromptError` for bad input, `TenantRefused` for a tenant that is not served, and
    `StoreError` where the store has room for nothing of a request, or could not remove something: the request can be
    repeated then. Once `forget` or `forget_document` has returned, no request that begins later uses the KV.
    """

    async def add(self, tenant: str, texts: Sequence[str], document: str | None) -> Added:
        """Store the KV of these chunks, as parts of this document if one is named."""
        ...

    async def replace(self, tenant: str, document: str, texts: Sequence[str]) -> Replaced:
        """Let the document have these chunks and no others."""
        ...

    async def forget(self, tenant: str, texts: Sequence[str], document: str | None = None) -> None:
        """Delete the KV of these chunks, whatever document they are parts of. With a ``document`` they are no parts of
        it any longer, and the KV of those goes that no other document has.
        """
        ...

    async def forget_document(self, tenant: str, document: str) -> None:
        """Delete the document's chunks, except those that another document has as well."""
        ...

    async def fuse(self, tenant: str, neighbours: Mapping[str, Sequence[str]] | None) -> Added:
        """Store a variant of each of these chunks, computed behind its ``neighbours`` (see `Engine.fuse`); None: of the
        chunks of two prompts or more, behind those that are likely to precede them.
        """
        ...

    async def stats(self, tenant: str) -> ChunkStats: ...
