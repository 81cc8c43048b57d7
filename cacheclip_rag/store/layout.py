"""Reads the tensors of a safetensors file without copying them, with the same checks as safetensors.

`safetensors.torch.load` copies every tensor out of the bytes, which costs as much as a checksum over them. Files are
still written by safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


_SIZES = {dtype: dtype.itemsize for dtype in _DTYPES.values()}


class Rejected(Exception):
    """A file that must not be served; the message is the reason, in a word or two."""


class Placed(NamedTuple):
    """A tensor and the bytes it lies in. Its dtype and shape stand beside it, since to ask a tensor takes longer."""

    tensor: Tensor
    raw: memoryview
    dtype: torch.dtype
    shape: tuple[int, ...]


def where(about: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """First byte, end, dtype and shape of a tensor, by what the header says of it. Raises `Rejected`."""
    start, stop, kind, shape = _place(about)
    return start, stop, _DTYPES[kind], shape


def measure(header: Mapping[str, Any]) -> int:
    """How many bytes the tensors of ``header`` take behind it, and that they fill them. Raises `Rejected`."""
    end = 0
    for start, stop, kind, shape in sorted(_place(about) for about in header.values()):
        if start != end or stop - start != math.prod(shape) * _SIZES[_DTYPES[kind]]:
            raise Rejected("damaged")
        end = stop
    return end


def read_tensors(header: Mapping[str, Any], data: memoryview) -> dict[str, Placed]:
    """The tensors that ``header`` (without the metadata) finds in the writable ``data`` behind it; they share its
    memory.

    They must fill it without gap or overlap, each as many bytes as its shape says. Raises `Rejected`.
    """
    places = sorted((_place(about), name) for name, about in header.items())
    tensors, end = dict[str, Placed](), 0
    for (start, stop, kind, shape), name in places:
        dtype = _DTYPES[kind]
        size = _SIZES[dtype]
        if start != end or stop - start != math.prod(shape) * size or start % size or stop > len(data):
            raise Rejected("damaged")
        end, raw = stop, data[start:stop]
        flat = torch.frombuffer(raw, dtype=dtype) if stop > start else torch.empty(0, dtype=dtype)
        # Sizes one by one are parsed twice as quickly as a tuple.
        tensors[name] = Placed(flat.view(*shape) if shape else flat.view(()), raw, dtype, shape)
    if end != len(data):
        raise Rejected("damaged")
    return tensors


def _place(about: Any) -> tuple[int, int, str, tuple[int, ...]]:
    """First byte, end, dtype and shape. Raises `Rejected`."""
    try:
        kind, shape, (start, stop) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise Rejected("damaged") from error
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise Rejected("damaged")
    for number in (start, stop, *shape):
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise Rejected("damaged")
    return start, stop, kind, shape
