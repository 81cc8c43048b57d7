"""The fields and options of a model that a server answers for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...errors import ConfigurationError
from ...frameworks import read_options
from ...frameworks.fields import check_values
from ...frameworks.options import ENGINES_OWN, refuse_misspelling

_FLAGS = {
    "auxiliary": "--auxiliary",
    "device": "--device",
    "disk_bytes": "--cap",
    "dtype": "--dtype",
    "kv_dir": "--store",
    "kv_dtype": "--kv-dtype",
    "remote": "--remote",
    "secret": "--secret-file",
    "store": "--store",
    "tenant": "--api-key KEY=TENANT",
}
"""Options of an engine, and how they are said to a server."""

_SERVERS_OWN = {*_FLAGS, *ENGINES_OWN, "fuse_when_idle", "given", "max_requests", "prefix"}

_REUSE = ("method", "recompute_ratio")
_BODY = ("top_k", "min_p", "repetition_penalty")
"""Options that OpenAI's client does not know, and both servers do."""


def server_fields(given: Mapping[str, Any], known: Collection[str], also_called: Mapping[str, str]) -> dict[str, Any]:
    """What a model of a server is made with, under its fields' names; None means not given.

    Raises `ConfigurationError` for what only an engine of this process has, which names the server's way to say it, for
    a misspelt field, and for a value that makes no sense. Other fields are left out, and said so once.
    """
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in _SERVERS_OWN:
            flag = f": cacheclip serve MODEL {_FLAGS[name]} ..." if name in _FLAGS else ""
            raise ConfigurationError(f'with base_url, "{name}" is for the server to know, leave it out{flag}')
        own = also_called.get(name, name)
        if own in known:
            fields.setdefault(own, value)
        else:
            refuse_misspelling(name, [*known, *also_called])
    check_values(fields)
    return fields


def asked(call: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of OpenAI's client for one call: what is none of its own goes into ``extra_body``.

    ``call``: keywords of the call; ``fields``: `method` and `recompute_ratio` of the model, of which the second belongs
    to the first. The report is asked for, too. Raises `ConfigurationError` for a value that makes no sense.
    """
    kwargs = {name: value for name, value in call.items() if name not in (*_REUSE, *_BODY, "extra_body")}
    reuse = {name: call[name] for name in _REUSE if call.get(name) is not None}
    if "method" not in reuse:
        reuse = {**{name: fields[name] for name in _REUSE if fields.get(name) is not None}, **reuse}
    body = {name: call[name] for name in _BODY if call.get(name) is not None}
    read_options({**reuse, **body})
    if not isinstance(reuse.get("method", ""), str):
        raise ConfigurationError("a server is told a method by its name")
    own: dict[str, Any] = dict(call.get("extra_body") or {})
    transfer = dict(own.pop("kv_transfer_params", None) or {})
    said = {"report": True, **reuse, **(transfer.get("cacheclip") or {})}
    kwargs["extra_body"] = {**body, **own, "kv_transfer_params": {**transfer, "cacheclip": said}}
    return kwargs
