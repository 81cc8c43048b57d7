"""Options of one call: which there are, under which names, and what values make sense."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Real
from typing import Any

from ..errors import ConfigurationError

log = logging.getLogger("cacheclip_rag")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _share(value: Any) -> bool:
    return _number(value) and 0.0 <= value <= 1.0


_VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "question": (lambda v: isinstance(v, str), "the question's text"),
    "method": (lambda v: isinstance(v, str) or hasattr(v, "select"), "a method's name"),
    "recompute_ratio": (_share, "a number from 0 (plain reuse) to 1 (full prefill)"),
    "max_new_tokens": (lambda v: _whole(v) and v >= 1, "a whole number of at least 1"),
    "min_new_tokens": (lambda v: _whole(v) and v >= 0, "a whole number of at least 0"),
    "stop": (lambda v: isinstance(v, (list, tuple)) and all(isinstance(s, str) for s in v), "a string or several"),
    "do_sample": (lambda v: isinstance(v, bool), "True or False"),
    "temperature": (lambda v: _number(v) and v >= 0, "a number of at least 0"),
    "top_p": (_share, "a number from 0 to 1"),
    "top_k": (lambda v: _whole(v) and v >= 0, "a whole number of at least 0"),
    "min_p": (_share, "a number from 0 to 1"),
    "typical_p": (_share, "a number from 0 to 1"),
    "repetition_penalty": (lambda v: _number(v) and v > 0, "a number above 0"),
    "no_repeat_ngram_size": (lambda v: _whole(v) and v >= 0, "a whole number of at least 0"),
}
_ALIASES = {"max_tokens": "max_new_tokens", "stop_sequences": "stop"}

ENGINES_OWN = {
    "disk_bytes",
    "kv_dtype",
    "memory_bytes",
    "on_uncomposable",
    "remote",
    "require_verified",
    "secret",
    "store",
}
"""Options of `Engine` that are no field of the frameworks' models."""

_told: set[str] = set()


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
        if known not in _VALID:
            refuse_misspelling(name, [*_VALID, *_ALIASES], foreign)
            continue
        if known == "stop" and isinstance(value, str):
            value = [value]
        valid, wanted = _VALID[known]
        if not valid(value):
            raise ConfigurationError(f"{name} must be {wanted}, not {value!r}")
        options[known] = value
    return options


def check_fields(given: Iterable[str], known: Collection[str], foreign: Collection[str] = ()) -> None:
    """What a framework's model is made with. Raises `ConfigurationError` for a misspelt field, and for one that only an
    engine has: left out, it would seem to work. Others are left out, and said so once; those in ``foreign`` in silence.
    """
    for name in given:
        if name in ENGINES_OWN:
            raise ConfigurationError(
                f'"{name}" is an option of the engine: open Engine(MODEL, {name}=...) and give it to from_engine()'
            )
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
    if name not in _told:
        _told.add(name)
        log.warning("there is no option %r: it is left out", name)
