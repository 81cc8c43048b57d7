"""Chunks, their KV, and the keys both are stored under."""

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
"""Chunks shorter than this (characters) are not stored: prefilling them is as quick."""


def canonical(text: str) -> str:
    """The text that identifies a chunk: stripped, because prompt builders and chat templates strip what they insert."""
    return text.strip()


@dataclass(frozen=True)
class Namespace:
    """Everything, besides the text, that a chunk's KV depends on. Any other value is another namespace.

    ``fields`` is JSON-like; `digest` is the sha256 of its canonical form, in hex. With a ``secret``, keys are keyed
    digests and files are authenticated: without the secret nobody can tell from a key which text is stored, nor replace
    a chunk. Another secret is another namespace.
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
        """The digest (hex) that the KV of this text is stored under, computed in this context (see `ChunkKV`)."""
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
    """One chunk's KV as it is stored.

    ``keys``, ``values [L, Hk, n, D]``; ``ids [n]`` int64 and ``offsets [n, 2]`` int64 (character span in ``text``) are
    the tokenisation the KV belongs to; ``extra`` holds further tensors of the encoder, ``[n, ...]`` by name.

    Keys are rotated: token j is at RoPE position ``position + j``, the position it was computed at. Rotating it back to
    0 would add a rounding error, and a chunk placed where it was encoded is copied bit for bit.

    ``context``: the texts of the chunks that this one was computed behind, in order. The KV contains information from
    all of them, so it is deleted together with any of them. ``in_sequence``: the context was computed as one text, as
    in a prompt; otherwise each of its chunks by itself. ``packing``: scales of quantised KV (`store.int8`); empty for
    KV in the model's dtype.
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
