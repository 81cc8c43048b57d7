"""The file of rows: append-only JSONL, in which the newest row of a key counts."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from cacheclip_rag.errors import ConfigurationError

log = logging.getLogger("cacheclip_rag")

Row = dict[str, Any]
Key = tuple[str, str, str]
"""Data set, item, system."""

SETTLED = ("method", "auxiliary", "requested_ratio", "prompt", "max_new_tokens")
"""Fields of a row's configuration: a run does not accept rows with other values."""


_MEASURED = ("score", "agree", "kl")


def prepare(path: Path) -> None:
    """Create the file and its folder. Raises `ConfigurationError` if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ConfigurationError(f"rows cannot be written to {path}: {error}") from error


def read(path: str | Path, *, repair: bool = False) -> dict[Key, Row]:
    """The newest row of every key, in the order in which keys first appear.

    An incomplete last line, as a killed run leaves it, is skipped with a warning, and with ``repair`` removed from the
    file, so that rows can be appended. Raises `ConfigurationError` for any other malformed line, with its number, and
    for a file that cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"no rows: {error}") from error
    whole, _, tail = data.rpartition(b"\n")
    rows: dict[Key, Row] = {}
    for number, line in enumerate(whole.split(b"\n"), start=1):
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            raise ConfigurationError(f"{path}, line {number} is no row: delete that line to go on")
        rows[key(row)] = row
    if tail.strip():
        row = _row(tail)
        if row is not None:
            rows[key(row)] = row
        else:
            log.warning("%s: the last line was cut short and is left out; its item runs again", path)
        if repair:
            _mend(Path(path), len(data), 0 if row is not None else len(tail))
    return rows


def key(row: Row) -> Key:
    return row["dataset"], row["id"], row["system"]


def differs(row: Row, wanted: Row) -> str | None:
    """The first field of `SETTLED` in which a row differs from ``wanted``; rows of older versions lack some of them."""
    return next((name for name in SETTLED if name in row and row[name] != wanted[name]), None)


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
        whole = "error" in row or all(isinstance(row[name], (int, float)) for name in _MEASURED)
        return row if whole and all(isinstance(part, str) for part in key(row)) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _mend(path: Path, size: int, surplus: int) -> None:
    """Remove ``surplus`` bytes at the end, or terminate the last line."""
    if surplus:
        os.truncate(path, size - surplus)
    else:
        with path.open("ab") as file:
            file.write(b"\n")
