"""The options of one call: valid names, aliases and values."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..errors import ConfigurationError
from ..serving.sampling import OPTIONS, PASSED, check

log = logging.getLogger("cacheclip_rag")


_ALIASES = {"max_tokens": "max_new_tokens", "stop_sequences": "stop"}

ENGINES_OWN = {
    "audit",
    "decode_weights",
    "disk_bytes",
    "kv_dtype",
    "memory_bytes",
    "on_uncomposable",
    "prompt_lookup",
    "remote",
    "require_verified",
    "secret",
    "store",
}
"""Options of `Engine` that are no field of the frameworks' models."""

_warned: set[str] = set()


def read_options(given: Mapping[str, Any], foreign: Collection[str] = ()) -> dict[str, Any]:
    """What a caller gave, under the engine's names; None means not given.

    Frameworks pass keywords that mean nothing here (``tools``, ``response_format``): these are left out, and said so
    once; those in ``foreign`` in silence. A misspelt option is an error rather than left out. Raises
    `ConfigurationError`.
    """
    options: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        known = _ALIASES.get(name, name)
        if known in PASSED:  # the engine takes or refuses it
            options[known] = value
            continue
        if known not in OPTIONS:
            refuse_misspelling(name, [*OPTIONS, *_ALIASES], foreign)
            continue
        if known == "stop" and isinstance(value, str):
            value = [value]
        check(name, value, known)
        options[known] = value
    return options


def call_options(given: Mapping[str, Any], fields: Mapping[str, Any], foreign: Collection[str] = ()) -> dict[str, Any]:
    """The engine's options for one call: what the call says, then what the model's fields say. Raises
    `ConfigurationError`, as `read_options` does.
    """
    call, own = read_options(given, foreign), dict(fields)
    if "method" in call:  # the fields' ratio belongs to the fields' method
        own.pop("method", None)
        own.pop("recompute_ratio", None)
    if not own.get("temperature") and call.get("do_sample"):  # sampling at temperature 0 is no sampling
        own.pop("temperature", None)
    return {name: value for name, value in {**own, **call}.items() if value is not None}


def check_fields(given: Iterable[str], known: Collection[str], foreign: Collection[str] = ()) -> None:
    """What a framework's model is made with. Raises `ConfigurationError` for a misspelt field, and for one that only an
    engine has: left out, it would seem to work. Others are left out, and said so once; those in ``foreign`` in silence.
    """
    for name in given:
        if name in ENGINES_OWN:
            raise ConfigurationError(
                f'"{name}" is an option of the engine: open Engine(MODEL, {name}=...) and give it to from_engine()'
            )
        if _ALIASES.get(name) in known and name not in {*known, *foreign}:
            raise ConfigurationError(f'unknown option "{name}"; did you mean "{_ALIASES[name]}"?')
        if name in {*OPTIONS, *_ALIASES, *PASSED} - {*known, *foreign}:
            raise ConfigurationError(f'"{name}" is an option of a call: give it to complete, chat or invoke')
        if name not in known:
            refuse_misspelling(name, known, foreign)


def refuse_misspelling(name: str, known: Iterable[str], foreign: Collection[str] = ()) -> None:
    """Raises `ConfigurationError` for a name that resembles a known one; any other is left out, and said so once.

    Names in ``foreign`` are left out in silence.
    """
    if name in foreign:
        return
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.8)
    if close:
        raise ConfigurationError(f'unknown option "{name}"; did you mean "{close[0]}"?')
    if name not in _warned:
        _warned.add(name)
        log.warning("there is no option %r: it is left out", name)
