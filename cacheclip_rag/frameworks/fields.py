"""Pydantic fields that `CacheClipLLM` and `ChatCacheClip` have in common: types, validation, descriptions.

Pydantic, in which both frameworks write their models, is needed to import this module, and comes with either of them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from .engines import encoding_of
from .options import check_fields, read_options

PER_CALL = ("method", "recompute_ratio", "temperature", "top_p", "top_k", "seed", "stop")
"""Fields that a call can override, beside the longest answer, which frameworks call by different names."""


def _path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _named(value: Any) -> str:
    return str(value).removeprefix("torch.")


ModelName = Annotated[str, Field(description="A catalogue name, hub id, folder or GGUF file.")]
Auxiliary = Annotated[str | None, Field(description="The small model that selects tokens to recompute.")]
KvDir = Annotated[
    str | None, BeforeValidator(_path), Field(description="The folder that keeps chunk KV; None: in memory only.")
]
Method = Annotated[
    str | None,
    Field(description='How to select tokens, as in "cacheclip:group_size=16"; None: the engine\'s default.'),
]
RecomputeRatio = Annotated[
    float | None, Field(description="Share of chunk tokens to recompute, 0 to 1; None: the method's default.")
]
TopP = Annotated[float | None, Field(description="For sampling: the likeliest tokens of this mass only.")]
TopK = Annotated[int | None, Field(description="For sampling: the so many likeliest tokens only.")]
Seed = Annotated[
    int | None,
    Field(description="For sampling: the same request gets the same answer, whatever is sampled meanwhile."),
]
Stop = Annotated[list[str] | None, BeforeValidator(_listed), Field(description="Strings that end an answer.")]
Prefix = Annotated[
    str | None,
    Field(description="The text chunks are encoded behind; None: what opens the model's chat template."),
]
Tenant = Annotated[str, Field(description="Separates chunk KV of different owners.")]
Dtype = Annotated[str, BeforeValidator(_named), Field(description='"float32", "bfloat16", ..., or "auto".')]
Device = Annotated[str, Field(description='"cpu", "cuda", ..., or "auto".')]
MaxRequests = Annotated[int, Field(ge=1, description="In flight at the same time; further ones wait.")]
FuseWhenIdle = Annotated[
    bool,
    Field(description="While nothing is asked, fuse chunks with those they often come with (`auto` takes them)."),
]


def checked_fields(
    given: Mapping[str, Any],
    known: Mapping[str, Any],
    also_called: Mapping[str, str],
    foreign: Collection[str] = (),
) -> dict[str, Any]:
    """What a model is made with, under its fields' names. ``also_called``: what the other framework calls them.

    Raises `ConfigurationError` for a misspelt field, an unknown method, or a value that makes no sense.
    """
    fields = dict(given)
    for other, name in also_called.items():
        if other in fields:
            fields.setdefault(name, fields.pop(other))
            fields.pop(other, None)
    check_fields(fields, known, foreign)
    encoding_of(fields.get("method"))
    check_values(fields)
    return fields


def check_values(fields: Mapping[str, Any]) -> None:
    """Raises `ConfigurationError` for the value of a field of an answer that makes no sense."""
    read_options({name: _number(value) for name, value in fields.items() if name in _CHECKED})


_CHECKED = {*PER_CALL, "max_tokens", "max_new_tokens"}


def _number(value: Any) -> Any:
    """A number that is written as text, in a configuration file or an environment variable, is one to pydantic too."""
    for kind in (int, float):
        try:
            return kind(value) if isinstance(value, str) else value
        except ValueError:
            pass
    return value
