"""How a method is written in one line: ``name[:parameter=value,...]``, as in ``"cacheclip:group_size=16"``."""

from __future__ import annotations

import ast
import dataclasses
import re
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import ConfigurationError

PREFIXES: dict[str, str | None] = {
    "none": "",
    "token": " ",
    "newline": "\n",
    "generic": "The following is a passage of a document.\n\n",
    "system": None,
}
"""Encode prefixes (texts that chunks are encoded behind) by name. ``token``: one blank; ``system``: what precedes the
user's text in the model's chat template. A model with a begin-of-sequence token has it in front of each."""

_PARTS = re.compile(r"""(?:[^,'"()\[\]]|'[^']*'|"[^"]*"|\([^()]*\)|\[[^\[\]]*\])+""")


def parse(text: str) -> tuple[str, dict[str, str]]:
    """The name and the parameters, still as text. Raises `ConfigurationError` for anything written differently."""
    name, _, rest = text.strip().partition(":")
    parameters: dict[str, str] = {}
    for part in split(rest):
        parameter, equals, value = part.partition("=")
        if not equals or not parameter.strip() or not value.strip():
            raise ConfigurationError(f'"{text}": write name:parameter=value,..., not "{part}"')
        parameters[parameter.strip()] = value.strip()
    return name.strip(), parameters


def split(text: str) -> list[str]:
    """Split at the commas outside quotes and brackets. Raises `ConfigurationError` if one of these is left open."""
    if set(_PARTS.sub("", text)) - {","}:
        raise ConfigurationError(f'quotes or brackets are left open in "{text}"')
    return [part.strip() for part in _PARTS.findall(text) if part.strip()]


def value(name: str, text: str) -> Any:
    """The value that a parameter's text stands for: one of `PREFIXES`, a Python literal, or a plain word."""
    if name == "prefix" and text in PREFIXES:
        return PREFIXES[text]
    try:
        meant = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        meant = None if name == "prefix" else text
    if name == "prefix" and not isinstance(meant, str):
        raise ConfigurationError(f"unknown prefix {text}: choose from {', '.join(PREFIXES)}, or quote a text")
    return meant


def check(method: str, name: str, given: Any, part: Any) -> None:
    """Raises `ConfigurationError` unless ``given`` fits the type of the field ``name`` of the dataclass ``part``."""
    hint = get_type_hints(type(part))[name]
    if not _fits(given, hint):
        wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise ConfigurationError(f'method "{method}": {name} must be {wanted}, not {given!r}')


def at_least(least: float, **given: float | None) -> None:
    """Raises `ConfigurationError` for a parameter below ``least``. None means that a parameter is not given."""
    for name, value in given.items():
        if value is not None and not value >= least:
            raise ConfigurationError(f"{name} must be at least {least}, not {value}")


def describe(part: Any) -> str:
    """A dataclass with the fields that differ from their defaults, so that a field added later changes no description
    of an older value.
    """
    changed = []
    for field in filter(lambda field: field.repr, dataclasses.fields(part)):
        value = getattr(part, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value != default:
            inner = dataclasses.is_dataclass(value) and not isinstance(value, type)
            changed.append(f"{field.name}={describe(value) if inner else repr(value)}")
    return f"{type(part).__name__}({', '.join(changed)})"


def parameters(parts: list[Any]) -> list[str]:
    """The names of all parameters of a method's parts."""
    return sorted({f.name for part in parts if dataclasses.is_dataclass(part) for f in dataclasses.fields(part)})


def _fits(given: Any, hint: Any) -> bool:
    """Whether a value is of a type; True for types that are not handled here."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return given in arguments
    if origin in (Union, UnionType):
        return any(_fits(given, argument) for argument in arguments)
    if origin is tuple:
        if not isinstance(given, tuple) or Ellipsis in arguments:
            return isinstance(given, tuple)
        return len(given) == len(arguments) and all(map(_fits, given, arguments))
    if hint in (int, float):
        return isinstance(given, (int, hint)) and not isinstance(given, bool)
    return isinstance(given, hint) if isinstance(hint, type) else True
