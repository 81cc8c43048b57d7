"""The table of methods: one row per name; ``"cacheclip:group_size=16"`` is a row with a parameter changed."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from .. import spec
from ..deprecation import warn, warn_dropped
from ..errors import ConfigurationError
from ..kv.encode import Blanks, Harvested, Isolated, Linked, Packet, WithActivations
from ..kv.fit import Fit, LongestPath, Nearest, Ordered
from ..kv.prefix_caching import DocumentTree, PrefixBlocks
from .attend.scaled import Scaled
from .attend.selected_chunks import SelectedChunks
from .method import Method, check_ratio
from .recompute.carry import Carry
from .recompute.early_stop import EarlyStop
from .recompute.reselect import Reselect
from .select.a3 import A3
from .select.cacheblend import KeyDeviation
from .select.cacheclip import CacheClip
from .select.cachecraft import InterAttentionTokens
from .select.epic import LeadingTokens
from .select.everything import Everything
from .select.nothing import Nothing
from .select.query_guided import QueryGuided
from .select.random import Random

FUSED = "fused"
"""A parameter of every method that encodes ahead: whether it takes fused variants, and by what rule."""

_FITS: dict[Any, Fit | None] = {
    True: Nearest(),
    False: None,
    "overlap": Nearest(),
    "order": Ordered(),
    "path": LongestPath(),
}

_PARTS = ("select", "encode", "recompute", "attend", "prefix_cache", "fit")
_OWN = ("fitted_ratio", "positions", "recompute_ratio", "reorder")
RENAMED = {"window": "group_size"}
"""Former names of parameters."""

_BARE = Isolated(prefix="")
_BAND = (0.69, 0.83)
"""The relative depths at which InfoFlow found the question's attention most informative."""

_ROWS = [
    Method("full", Everything(), recompute_ratio=1.0, about="compute everything; the oracle"),
    Method(
        "prefix-cache",
        Everything(),
        prefix_cache=PrefixBlocks(),
        recompute_ratio=0.0,
        about="prefix caching in chained blocks of 16 tokens (automatic prefix caching in vLLM)",
    ),
    Method(
        "ragcache",
        Everything(),
        prefix_cache=DocumentTree(),
        recompute_ratio=0.0,
        about="prefix caching in a tree of documents (RAGCache, 2404.12457)",
    ),
    Method("naive", Nothing(), recompute_ratio=0.0, about="plain reuse, encoded behind a shared prefix"),
    Method(
        "promptcache",
        Nothing(),
        _BARE,
        recompute_ratio=0.0,
        about="plain reuse, encoded without a prefix (PromptCache)",
    ),
    Method(
        "link0",
        Nothing(),
        Blanks(),
        recompute_ratio=0.0,
        about="plain reuse, encoded behind 5 dummy tokens (EPIC's zero-overhead linking, 2410.15332)",
    ),
    Method("random", Random(), recompute_ratio=0.15, about="random tokens: the baseline of every selector"),
    Method(
        "epic",
        LeadingTokens(),
        _BARE,
        recompute_ratio=0.15,
        about="the leading tokens of every chunk, encoded without a prefix (EPIC, 2410.15332, as in the study)",
    ),
    Method(
        "legolink",
        LeadingTokens(tokens=16),
        _BARE,
        recompute_ratio=0.15,
        about="the first 16 tokens of every chunk, whatever the ratio (EPIC's LegoLink-16, 2410.15332)",
    ),
    Method(
        "cacheblend",
        KeyDeviation(),
        _BARE,
        recompute_ratio=0.15,
        about="tokens whose keys deviate most from a full prefill's at layer 1 (CacheBlend, 2405.16444)",
    ),
    Method(
        "blockattention",
        KeyDeviation(),
        _BARE,
        recompute_ratio=0.0,
        about="plain reuse with weights trained for it, by adapter=FOLDER; at a ratio, cacheblend's selection "
        "(Block-Attention, 2409.15355)",
    ),
    Method(
        "turborag",
        KeyDeviation(),
        _BARE,
        recompute_ratio=0.0,
        about="the same with TurboRAG's weights; positions=shared is its composite scheme, else the reordered one "
        "(TurboRAG, 2410.07590)",
    ),
    Method(
        "kvlink",
        KeyDeviation(),
        Linked(),
        recompute_ratio=0.0,
        about="plain reuse with trained link tokens behind each chunk, by adapter=FOLDER; at a ratio, cacheblend's "
        "selection (KVLink, 2502.16002)",
    ),
    Method(
        "kvpacket",
        KeyDeviation(),
        Packet(),
        recompute_ratio=0.0,
        about="plain reuse between a trained header and trailer, by adapter=FOLDER; at a ratio, cacheblend's selection "
        "(KV Packet, 2604.13226)",
    ),
    Method(
        "droidspeak",
        KeyDeviation(),
        WithActivations(prefix=""),
        Reselect(),
        recompute_ratio=0.15,
        about="cacheblend, selected again at layer 5 from stored activations (DroidSpeak, 2411.02820, as in the study)",
    ),
    Method(
        "cachecraft",
        InterAttentionTokens(),
        Harvested(),
        EarlyStop(),
        about="variants from finished prompts; tokens that attended to chunks now missing (Cache-Craft, 2502.15734)",
    ),
    Method(
        "cacheclip",
        CacheClip(),
        about="an auxiliary model's attention from the question, in groups of 8 (CacheClip, 2510.10129)",
    ),
    Method(
        "query_guided",
        QueryGuided(),
        about="the model's own last-layer attention from the question, in groups of 8 (the generic form)",
    ),
    Method(
        "fusionrag_selection",
        QueryGuided("last", "chunk", group_size=1),
        recompute_ratio=0.15,
        about="the same, softmax inside each chunk, single tokens (FusionRAG's online half, 2601.12904)",
    ),
    Method(
        "fusionrag",
        QueryGuided("last", "chunk", group_size=1),
        fit=Nearest(),
        recompute_ratio=0.15,
        about="the same over fused chunks (FusionRAG, 2601.12904)",
    ),
    Method(
        "prophetkv",
        QueryGuided("all", "context", group_size=1),
        about="the question's attention in all layers, softmax over the context (ProphetKV, 2602.02579)",
    ),
    Method(
        "infoflow",
        QueryGuided(_BAND, "row", group_size=1),
        recompute_ratio=0.15,
        about="the question's attention in a band of mid-late layers (InfoFlow, 2603.05353)",
    ),
    A3,
    Method(
        "auto",
        QueryGuided(_BAND, "chunk", group_size=1),
        recompute=Carry(),
        fit=Nearest(),
        fitted_ratio=0.04,
        about="infoflow's band, softmax inside each chunk, over fused chunks; isolated chunks are adjusted by the mean "
        "change of their recomputed tokens; the better fused chunks fit, the less is recomputed (our own)",
    ),
    Method(
        "ape",
        Nothing(),
        attend=Scaled(),
        positions="shared",
        recompute_ratio=0.0,
        about="plain reuse at shared positions; temperature and scale on the context (APE, 2502.05431)",
    ),
    Method(
        "sel",
        Nothing(),
        attend=SelectedChunks(),
        recompute_ratio=0.0,
        about="plain reuse; the question attends to 2 chunks per layer (SEL, 2412.16545)",
    ),
    Method(
        "psr",
        KeyDeviation(),
        Blanks(),
        attend=Scaled(first=1),
        recompute_ratio=0.15,
        about="cacheblend's selection behind dummy tokens; temperature and scale on the rest (the study, 2603.20218)",
    ),
]

METHODS: dict[str, Method] = {method.name: method for method in _ROWS}


def register(method: Method) -> Method:
    """Add a method of another package to `METHODS`, and return it.

    Raises `ConfigurationError` if another method has this name, or if the name contains characters that are reserved
    in method strings.
    """
    if not method.name or set(method.name) & set(":,=@ \"'()[]"):
        raise ConfigurationError(f"a method's name is a word without :, =, @, blanks or quotes, not {method.name!r}")
    if METHODS.get(method.name, method) != method:
        raise ConfigurationError(f'there is a method "{method.name}" already: choose another name')
    METHODS[method.name] = method
    return method


def resolve(method: str | Method, **changes: Any) -> Method:
    """The method called ``method``, with parameters of its parts changed by name.

    ``resolve("cacheclip", group_size=16)`` or, in one string, ``resolve("cacheclip:group_size=16")``, which works
    wherever a method's name does. A parameter that several parts share is changed in all of them. Raises
    `ConfigurationError`, with the valid names, for an unknown method or parameter.
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


def with_prefix(method: str | Method, prefix: str | None) -> Method:
    """The method called ``method``, with ``prefix`` as its encode prefix.

    Unchanged if ``prefix`` is None, if ``method`` names a prefix itself (``"cacheblend:prefix=none"``) or has an
    encoder with tokens of its own there, or if it is a `Method` and not a string. Raises as `resolve` does.
    """
    named = resolve(method)
    if prefix is None or isinstance(method, Method) or "prefix" in spec.parse(method)[1]:
        return named
    return resolve(named, prefix=prefix) if hasattr(named.encode, "prefix") else named


def _fused(method: Method, value: Any) -> Method:
    if not isinstance(value, bool | str) or value not in _FITS:
        raise ConfigurationError(f"{FUSED} is one of {', '.join(map(repr, _FITS))}, not {value!r}")
    if value is not False and not method.ahead:
        raise ConfigurationError(f'method "{method.name}" encodes no chunk ahead, so that none can be fused')
    return dataclasses.replace(method, fit=method.fit if value is True and method.fit else _FITS[value])


def _changed(method: Method, name: str, value: Any) -> Method:
    if name in RENAMED:
        warn(f"the parameter {name}", RENAMED[name], stacklevel=4)
        name = RENAMED[name]
    parts = {part: getattr(method, part) for part in _PARTS if getattr(method, part) is not None}
    for part in parts.values():
        if instead := getattr(part, "dropped", {}).get(name):
            warn_dropped(f"the parameter {name}", instead, stacklevel=4)
            return method
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
