"""Chunks, their KV, and the names under which both are known."""

from __future__ import annotations

import hashlib
import hmac
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

MIN_CHARS = 64
"""Chunks shorter than this (characters) are not worth recognising: prefilling them is as quick."""


def canonical(text: str) -> str:
    """The text a chunk is known by: stripped, because prompt builders and chat templates strip what they insert."""
    return text.strip()


@dataclass(frozen=True)
class Namespace:
    """Everything, beside the text, that a chunk's KV depends on. Another value anywhere is another namespace.

    ``fields`` is JSON-like; `digest` is the sha256 of its canonical form, in hex. With a ``secret``, the names of
    chunks are keyed digests and their files are authenticated by it: who does not know it cannot tell from a name which
    text is stored, nor put a chunk in its place. Another secret is another namespace.
    """

    fields: Mapping[str, Any]
    secret: bytes = field(default=b"", repr=False)

    @cached_property
    def json(self) -> str:
        fields = dict(self.fields)
        if self.secret:
            fields["keyed"] = hmac.new(self.secret, b"cacheclip-rag namespace", hashlib.sha256).hexdigest()[:32]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()

    def key(self, text: str, context: Sequence[str] = (), in_sequence: bool = False) -> str:
        """The digest (hex) under which the KV of a chunk with this text is stored, computed in this context (see
        `ChunkKV`).
        """
        text = canonical(text)
        if context:  # texts may hold any character, so each is preceded by its length
            parts = "".join(f"{len(part)}:{part}" for part in (text, *context))
            joined = (
                self.digest.encode() + (b"\1joint:" if in_sequence else b"\1") + parts.encode("utf-8", "surrogatepass")
            )
        else:
            joined = self.digest.encode() + b"\0" + text.encode("utf-8", "surrogatepass")
        return (hmac.new(self.secret, joined, hashlib.sha256) if self.secret else hashlib.sha256(joined)).hexdigest()


@dataclass(frozen=True, eq=False)
class ChunkKV:
    """One chunk's KV cache as it is stored.

    ``keys``, ``values [L, Hk, n, D]``; ``ids [n]`` int64 and ``offsets [n, 2]`` int64 (character span in ``text``) are
    the tokenisation the KV belongs to; ``extra`` is what an encoder keeps beside it, tensors ``[n, ...]`` by name. Keys
    are rotated: token j stands at RoPE position ``position + j``. Keeping the position they were computed at, instead
    of rotating back to 0, spares a rounding, and a chunk that is placed where it was encoded is copied bit for bit.
    ``packing`` is what a store keeps beside KV of fewer bits (`store.int8`); empty for KV that can be used.
    ``context``: the texts of the chunks that stood before this one when its KV was computed, in their order. It holds
    something of theirs, and goes when one of them goes. ``in_sequence``: these were computed as one text, as in a
    prompt; otherwise each by itself.
    """

    text: str
    ids: Tensor
    offsets: Tensor
    keys: Tensor
    values: Tensor
    position: int
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    context: tuple[str, ...] = ()
    in_sequence: bool = False
    packing: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def company(self) -> tuple[str, ...]:
        """The former name of `context`, for one release."""
        warnings.warn("ChunkKV.company is now context", DeprecationWarning, stacklevel=2)
        return self.context

    @property
    def joint(self) -> bool:
        """The former name of `in_sequence`, for one release."""
        warnings.warn("ChunkKV.joint is now in_sequence", DeprecationWarning, stacklevel=2)
        return self.in_sequence

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        tensors = (self.ids, self.offsets, self.keys, self.values, *self.extra.values(), *self.packing.values())
        return sum(t.numel() * t.element_size() for t in tensors)
