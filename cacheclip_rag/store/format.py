"""The file of one chunk's KV: safetensors with a self-describing, checksummed header.

Tensors: ``keys``, ``values [L, Hk, n, D]``; ``ids [n]`` and ``offsets [n, 2]`` int64; ``extra.NAME [n, ...]``, what an
encoder keeps beside them; ``int8.NAME``, what it takes to read KV in 8 bits (see `int8`). Metadata (strings):
``format``, ``key`` (the digest that names the file), ``namespace`` (JSON of everything the KV depends on), ``text``,
``position``; where the KV was computed behind other chunks, ``company`` (a JSON list of those chunks' texts, `ChunkKV.
context`) and, if these were computed as one text, ``joint``; and ``checksum``, the xxh3-128 of all that and the
tensors' bytes, or their HMAC-SHA256 where the namespace has a secret. One file alone suffices to rebuild the index.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch
import xxhash
from torch import Tensor

from ..chunks import ChunkKV, Namespace
from . import int8
from .layout import Placed, measure, read_tensors, where
from .layout import Rejected as Rejected

FORMAT = "cacheclip-rag/1"
OTHER_FORMAT = "other format"
"""Why a file of a version to come is rejected: it is not damaged."""
SUFFIX = ".safetensors"
MAX_HEADER = 16 << 20  # bytes; a header is a chunk's text and a few hundred bytes more
MAX_TENSORS = 64
_BEGINNING = 8 << 10  # bytes that hold most headers
_PIECE = 1 << 20  # bytes

_METADATA = {"format", "key", "namespace", "text", "position", "checksum"}
_TENSORS = ("ids", "keys", "offsets", "values")
_EXTRA, _PACKING = "extra.", "int8."
_canonical = json.JSONEncoder(sort_keys=True).encode


def dump(key: str, chunk: ChunkKV, namespace: Namespace) -> bytes:
    """The file's bytes. Raises UnicodeEncodeError for a text that is no valid Unicode (lone surrogates)."""
    tensors = {name: getattr(chunk, name) for name in _TENSORS}
    tensors |= {_EXTRA + name: tensor for name, tensor in chunk.extra.items()}
    tensors |= {_PACKING + name: tensor for name, tensor in chunk.packing.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "key": key,
        "namespace": namespace.json,
        "text": chunk.text,
        "position": str(chunk.position),
    }
    chunk.text.encode()
    if chunk.context:
        "".join(chunk.context).encode()
        metadata["company"] = json.dumps(chunk.context)
        if chunk.in_sequence:
            metadata["joint"] = "true"
    placed = {
        name: Placed(tensor, _bytes(tensor), tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    metadata["checksum"] = _checksum(placed, metadata, namespace)
    try:
        return safetensors.torch.save(tensors, metadata)
    except RuntimeError:  # some of them share memory, as an extra that is a view of the keys does
        return safetensors.torch.save({name: tensor.clone() for name, tensor in tensors.items()}, metadata)


Data = bytes | bytearray | memoryview


def header(head: Data) -> dict[str, str]:
    """The metadata at the start of a file. Raises `Rejected`."""
    return fields(head)["__metadata__"]


def read_fields(read: Callable[[int], Data]) -> dict[str, Any]:
    """As `fields`, of a file whose first n bytes ``read(n)`` gives, or what there is of them."""
    head = read(_BEGINNING)
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 + length <= 8 + MAX_HEADER:
        head = read(8 + length)
    return fields(head)


def fields(head: Data) -> dict[str, Any]:
    """The header at the start of a file: dtypes and shapes by tensor, and the checked metadata. Raises `Rejected`."""
    if len(head) < 8:
        raise Rejected("truncated")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER:
        raise Rejected("header too large")
    if len(head) < 8 + length:
        raise Rejected("truncated")
    try:
        found = json.loads(str(head[8 : 8 + length], "utf-8"))
        metadata = found["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Rejected("damaged header") from error
    if len(found) > MAX_TENSORS + 1:
        raise Rejected("too many tensors")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise Rejected(OTHER_FORMAT)
    if set(metadata) - {"company", "joint"} != _METADATA or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise Rejected("damaged header")
    return found


def check_file(read: Callable[[int, int], Data], status: os.stat_result, namespace: Namespace) -> None:
    """Whether a file is worth the memory that it takes to read it; ``read(n, offset)`` gives n of its bytes, or what
    there is of them. Raises `Rejected`.

    A file with holes is as large as somebody likes and takes no room on the disk. So it must be as large as its header
    says, and one that has holes is checked in pieces first: some file systems leave out what is all zeros.
    """
    found = read_fields(lambda count: read(count, 0))
    metadata = found.pop("__metadata__")
    start = 8 + int.from_bytes(read(8, 0), "little")
    end = measure(found)
    if status.st_size != start + end:
        raise Rejected("truncated" if status.st_size < start + end else "larger than its header says")
    if end > _PIECE and getattr(status, "st_blocks", status.st_size) * 512 < status.st_size // 2:
        digest = _digest({name: metadata[name] for name in metadata if name != "checksum"}, namespace)
        for name in sorted(found):
            first, stop, dtype, shape = where(found[name])
            digest.update(_described(name, dtype, shape))
            for at in range(start + first, start + stop, _PIECE):
                digest.update(read(min(_PIECE, start + stop - at), at))
        if not _equal(digest.hexdigest(), metadata["checksum"]):
            raise Rejected("checksum")


def context(metadata: dict[str, str]) -> tuple[str, ...]:
    """The texts a chunk's KV was computed with. Raises `Rejected`."""
    if "company" not in metadata:
        return ()
    try:
        texts = json.loads(metadata["company"])
    except (ValueError, RecursionError) as error:
        raise Rejected("damaged header") from error
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Rejected("damaged header")
    return tuple(texts)


def load(data: Data, key: str, namespace: Namespace) -> ChunkKV:
    """The chunk in a file's bytes, if all of it is as it was written, for this key and this namespace.

    Its tensors lie in ``data`` where that can be written to, and in one copy of it otherwise. Raises `Rejected`.
    """
    view = memoryview(data) if not memoryview(data).readonly else memoryview(bytearray(data))
    found = fields(view)
    metadata = dict(found.pop("__metadata__"))
    if metadata["namespace"] != namespace.json:
        raise Rejected("other model")
    text, checksum, others = metadata["text"], metadata.pop("checksum"), context(metadata)
    in_sequence = "joint" in metadata
    if metadata["key"] != key or namespace.key(text, others, in_sequence) != key:
        raise Rejected("other key")
    try:
        position = int(metadata["position"])
    except ValueError as error:
        raise Rejected("damaged") from error
    placed = read_tensors(found, view[8 + int.from_bytes(view[:8], "little") :])
    tensors = {name: one.tensor for name, one in placed.items()}
    extra, packing = _named(tensors, _EXTRA), _named(tensors, _PACKING)
    if len(tensors) != len(_TENSORS) + len(extra) + len(packing) or not _equal(
        _checksum(placed, metadata, namespace), checksum
    ):
        raise Rejected("checksum")
    if not set(_TENSORS) <= set(tensors):
        raise Rejected("damaged")
    _check_shapes(placed, extra, packing)
    kv: dict[str, Any] = {name: tensors[name] for name in _TENSORS}
    about: dict[str, Any] = {"context": others, "in_sequence": in_sequence}
    return ChunkKV(text=text, position=position, extra=extra, packing=packing, **about, **kv)


def _named(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_shapes(placed: Mapping[str, Placed], extra: Mapping[str, Tensor], packing: Mapping[str, Tensor]) -> None:
    ids, keys, offsets, values = (placed[name] for name in _TENSORS)
    count = math.prod(ids.shape)
    good = (
        ids.shape == (count,)
        and ids.dtype == offsets.dtype == torch.int64
        and offsets.shape == (count, 2)
        and len(keys.shape) == 4
        and keys.dtype == values.dtype
        and keys.shape == values.shape
        and keys.shape[2] == count
        and (int8.well_formed(keys.tensor, packing) if packing else keys.dtype.is_floating_point)
        and all(tensor.shape[:1] == (count,) for tensor in extra.values())
    )
    if not good:
        raise Rejected("shapes")


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _checksum(tensors: Mapping[str, Placed], metadata: dict[str, str], namespace: Namespace) -> str:
    """Over everything that is served: the tensors and what the header says of them."""
    digest = _digest(metadata, namespace)
    for name in sorted(tensors):
        _, raw, dtype, shape = tensors[name]
        digest.update(_described(name, dtype, shape))
        digest.update(raw)
    return digest.hexdigest()


def _digest(metadata: dict[str, str], namespace: Namespace) -> Any:
    digest: Any = hmac.new(namespace.secret, digestmod=hashlib.sha256) if namespace.secret else xxhash.xxh3_128()
    digest.update(_canonical(metadata).encode())
    return digest


def _described(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    return f"{name}:{dtype}:{shape};".encode()


def _equal(computed: str, said: str) -> bool:
    return hmac.compare_digest(computed.encode(), said.encode("utf-8", "surrogatepass"))
