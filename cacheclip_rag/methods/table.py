"""The recipe table: every method is a way of encoding and a way of selecting, and every name is one row."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

from .. import spec
from ..errors import ConfigurationError
from ..kv.encode import Blanks, Encoder, Harvested, Isolated, WithActivations
from ..kv.fit import Fit, LongestPath, Nearest, Ordered
from ..kv.prefix_caching import DocumentTree, PrefixBlocks, PrefixCaching
from .attend import Attend, Plain, Scaled, SelectedChunks
from .recompute import Carry, EarlyStop, Once, Recompute, Reselect
from .select import (
    CacheClip,
    Everything,
    InterAttentionTokens,
    KeyDeviation,
    LeadingTokens,
    Nothing,
    QueryGuided,
    Random,
    Selector,
)

Positions = Literal["global", "shared"]


@dataclass(frozen=True)
class Method:
    """A recipe: how chunks are encoded, which tokens are chosen, how they are recomputed, how the question attends.

    ``positions``: ``"global"``, every token at its place in the prompt; ``"shared"``, all chunks from the same position
    on, and the question behind the longest (APE). ``exact``: reuse only what stood in the same place behind the same
    tokens, and compute the rest; the other parts are then idle. ``fit``: take the fused variant of a chunk that fits
    the prompt best; None takes its KV computed by itself. ``reorder``: put the chunks the question attends to
    most next to it before anything is recomputed (InfoFlow's option; which end is our reading). ``recompute_ratio``:
    the share of context tokens to recompute unless a request asks for another; with a ``fitted_ratio``, the share for a
    prompt all of whose chunks were computed by themselves, and ``fitted_ratio`` that for one all of whose chunks stand
    in the context they were computed in; between the two in proportion to `context_fit`.
    """

    name: str
    select: Selector
    encode: Encoder = field(default_factory=Isolated)
    recompute: Recompute = field(default_factory=Once)
    attend: Attend = field(default_factory=Plain)
    positions: Positions = "global"
    prefix_cache: PrefixCaching | None = None
    fit: Fit | None = None
    reorder: bool = False
    recompute_ratio: float = 0.2
    fitted_ratio: float | None = None

    @property
    def ahead(self) -> bool:
        """Whether chunks are encoded ahead of the prompts they come in."""
        return self.prefix_cache is None and not isinstance(self.encode, Harvested)


FUSED = "fused"
"""A parameter of every method that encodes ahead: whether, and by what rule, it takes fused variants."""

_FITS: dict[Any, Fit | None] = {
    True: Nearest(),
    False: None,
    "overlap": Nearest(),
    "order": Ordered(),
    "path": LongestPath(),
}

_PARTS = ("select", "encode", "recompute", "attend", "prefix_cache", "fit")
_OWN = ("fitted_ratio", "positions", "recompute_ratio", "reorder")

METHODS: dict[str, Method] = {
    method.name: method
    for method in [
        Method("full", Everything(), recompute_ratio=1.0),
        Method("prefix-cache", Everything(), prefix_cache=PrefixBlocks(), recompute_ratio=0.0),
        Method("ragcache", Everything(), prefix_cache=DocumentTree(), recompute_ratio=0.0),
        Method("naive", Nothing(), recompute_ratio=0.0),
        Method("promptcache", Nothing(), Isolated(prefix=""), recompute_ratio=0.0),
        Method("link0", Nothing(), Blanks(), recompute_ratio=0.0),
        Method("random", Random(), recompute_ratio=0.15),
        Method("epic", LeadingTokens(), Isolated(prefix=""), recompute_ratio=0.15),
        Method("legolink", LeadingTokens(tokens=16), Isolated(prefix=""), recompute_ratio=0.15),
        Method("cacheblend", KeyDeviation(), Isolated(prefix=""), recompute_ratio=0.15),
        Method("droidspeak", KeyDeviation(), WithActivations(prefix=""), Reselect(), recompute_ratio=0.15),
        Method("cachecraft", InterAttentionTokens(), Harvested(), EarlyStop()),
        Method("cacheclip", CacheClip()),
        Method("query_guided", QueryGuided()),
        Method("fusionrag_selection", QueryGuided("last", "chunk", window=1), recompute_ratio=0.15),
        Method("fusionrag", QueryGuided("last", "chunk", window=1), fit=Nearest(), recompute_ratio=0.15),
        Method("prophetkv", QueryGuided("all", "context", window=1)),
        Method("infoflow", QueryGuided((0.69, 0.83), "row", window=1), recompute_ratio=0.15),
        Method(
            "auto",
            QueryGuided((0.69, 0.83), "chunk", window=1),
            recompute=Carry(),
            fit=Nearest(),
            fitted_ratio=0.04,
        ),
        Method("ape", Nothing(), attend=Scaled(), positions="shared", recompute_ratio=0.0),
        Method("sel", Nothing(), attend=SelectedChunks(), recompute_ratio=0.0),
        Method("psr", KeyDeviation(), Blanks(), attend=Scaled(first=1), recompute_ratio=0.15),
    ]
}


def with_prefix(method: str | Method, prefix: str | None) -> Method:
    """The recipe called ``method`` with its chunks behind the text ``prefix``, unless it names another itself, as in
    ``"cacheblend:prefix=none"``, puts tokens of its own there, or is a `Method`, which says all. None changes nothing.
    Raises as `resolve` does.
    """
    named = resolve(method)
    if prefix is None or isinstance(method, Method) or "prefix" in spec.parse(method)[1]:
        return named
    return resolve(named, prefix=prefix) if hasattr(named.encode, "prefix") else named


def resolve(method: str | Method, **changes: Any) -> Method:
    """The recipe called ``method``, with parameters of its parts changed by name.

    ``resolve("cacheclip", window=16)``, or all in one string, ``resolve("cacheclip:window=16")``, which works wherever
    a method's name does. A parameter that several parts share is changed in all of them. Raises `ConfigurationError`
    naming what is valid.
    """
    if isinstance(method, str):
        name, written = spec.parse(method)
        if name not in METHODS:
            close = difflib.get_close_matches(name, METHODS, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else ""
            raise ConfigurationError(f'unknown method "{name}"{hint} Known: {", ".join(METHODS)}')
        method = METHODS[name]
        changes = {name: spec.value(name, text) for name, text in written.items()} | changes
    for name, value in changes.items():
        method = _fused(method, value) if name == FUSED else _changed(method, name, value)
    check_ratio(method.recompute_ratio)
    if method.fitted_ratio is not None:
        check_ratio(method.fitted_ratio, "fitted_ratio")
    return method


def _fused(method: Method, value: Any) -> Method:
    if not isinstance(value, bool | str) or value not in _FITS:
        raise ConfigurationError(f"{FUSED} is one of {', '.join(map(repr, _FITS))}, not {value!r}")
    if value is not False and not method.ahead:
        raise ConfigurationError(f'method "{method.name}" encodes no chunk ahead, so that none can be fused')
    return dataclasses.replace(method, fit=method.fit if value is True and method.fit else _FITS[value])


def _changed(method: Method, name: str, value: Any) -> Method:
    parts = {part: getattr(method, part) for part in _PARTS if getattr(method, part) is not None}
    takers = {p: v for p, v in parts.items() if name in {f.name for f in dataclasses.fields(v)}}
    if not takers and name not in _OWN:
        valid = ", ".join(sorted({*_OWN, FUSED, *spec.parameters(list(parts.values()))}))
        raise ConfigurationError(f'method "{method.name}" has no parameter "{name}"; it has: {valid}')
    for part in takers.values() or [method]:
        spec.check(method.name, name, value, part)
    if not takers:
        return dataclasses.replace(method, **{name: value})
    changed: dict[str, Any] = {p: dataclasses.replace(v, **{name: value}) for p, v in takers.items()}
    return dataclasses.replace(method, **changed)


def check_ratio(ratio: float, name: str = "recompute_ratio") -> float:
    """Raises `ConfigurationError`, which calls it ``name``, unless ``ratio`` lies in 0..1."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 <= ratio <= 1.0:
        raise ConfigurationError(f"{name} must be a number from 0 (plain reuse) to 1 (full prefill), not {ratio!r}")
    return float(ratio)
