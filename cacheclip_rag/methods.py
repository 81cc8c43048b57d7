"""The recipe table: every method is a way of encoding and a way of selecting, and every name is one row."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

from .encode import Encoder, Isolated
from .errors import ConfigurationError
from .select import CacheClip, Everything, Nothing, QueryGuided, Selector


@dataclass(frozen=True)
class Method:
    """A recipe. ``recompute_ratio``: the share of context tokens to recompute unless a request asks for another."""

    name: str
    select: Selector
    encode: Encoder = field(default_factory=Isolated)
    recompute_ratio: float = 0.2


METHODS: dict[str, Method] = {
    method.name: method
    for method in [
        Method("full", Everything(), recompute_ratio=1.0),
        Method("naive", Nothing(), recompute_ratio=0.0),
        Method("cacheclip", CacheClip()),
        Method("query_guided", QueryGuided()),
        Method("fusionrag_selection", QueryGuided("last", "chunk", window=1), recompute_ratio=0.15),
        Method("prophetkv", QueryGuided("all", "context", window=1)),
        Method("infoflow", QueryGuided((0.69, 0.83), "row", window=1), recompute_ratio=0.15),
    ]
}


def resolve(method: str | Method, **changes: Any) -> Method:
    """The recipe called ``method``, with selector or encoder parameters changed by name.

    ``resolve("cacheclip", window=16)``. Raises `ConfigurationError` naming what is valid.
    """
    if isinstance(method, str):
        if method not in METHODS:
            close = difflib.get_close_matches(method, METHODS, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else ""
            raise ConfigurationError(f'unknown method "{method}"{hint} Known: {", ".join(METHODS)}')
        method = METHODS[method]
    for name, value in changes.items():
        for part in ("select", "encode"):
            component: Any = getattr(method, part)
            if name in {f.name for f in dataclasses.fields(component)}:
                method = dataclasses.replace(method, **{part: dataclasses.replace(component, **{name: value})})
                break
        else:
            parts: list[Any] = [method.select, method.encode]
            valid = sorted(f.name for part in parts for f in dataclasses.fields(part))
            raise ConfigurationError(f'method "{method.name}" has no parameter "{name}"; it has: {", ".join(valid)}')
    return method


def check_ratio(ratio: float) -> float:
    """Raises `ConfigurationError` unless ``ratio`` lies in 0..1."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 <= ratio <= 1.0:
        raise ConfigurationError(
            f"recompute_ratio must be a number from 0 (plain reuse) to 1 (full prefill), not {ratio!r}"
        )
    return float(ratio)
