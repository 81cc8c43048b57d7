"""Records of `verification`: one small file per model, machine and versions of libraries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..model.backbone import Backbone
from ..store import files
from . import pull

_MODEL = ("format", "architecture", "weights", "config", "tokenizer", "dtype")


def identity(namespace: Mapping[str, Any], backbone: Backbone) -> dict[str, str]:
    """What a verdict holds for: the model as in its chunks' namespace, device, attention and library versions."""
    model = {name: str(namespace[name]) for name in _MODEL}
    libraries = {name: version(name) for name in ("torch", "transformers")}
    return {**model, "device": backbone.device.type, "attention": backbone.attention, **libraries}


def path(who: Mapping[str, str]) -> Path:
    """The file of a record, in the folder ``verified`` of `pull.home`."""
    digest = hashlib.sha256(json.dumps(dict(who), sort_keys=True).encode()).hexdigest()
    return pull.home() / "verified" / f"{digest[:32]}.json"


def write(who: Mapping[str, str], record: Mapping[str, Any]) -> Path:
    """Write a record (JSON-like; `require` reads ``line`` and ``trusted``). Raises OSError."""
    target = path(who)
    files.make_directory(target.parent)
    files.publish(target, json.dumps({**record, "identity": dict(who)}, indent=1).encode())
    return target


def require(who: Mapping[str, str], name: str) -> None:
    """Raises `ConfigurationError` unless the model passed verification; ``name``: the name it was opened by."""
    try:
        record = json.loads(bytes(files.read(path(who), 1 << 20)))
        same, trusted, line = record["identity"] == dict(who), record["trusted"] is True, str(record["line"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        same = trusted = False
        line = ""
    if same and trusted:
        return
    dtype = "" if "dtype" not in who else f" --dtype {who['dtype']}"
    command = f"cacheclip verify {name}{dtype} --device {who['device']}"
    if same:
        raise ConfigurationError(f"{name} failed its verification on this machine ({line}); to look again: {command}")
    raise ConfigurationError(
        f"{name} was not verified on this machine with these versions of torch ({who['torch']}) and transformers "
        f"({who['transformers']}): run {command}"
    )
