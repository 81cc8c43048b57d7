"""Tells processes that share a folder that something was forgotten there, even chunks without a file.

A process knows texts whose files are gone: evicted, set aside as damaged, never kept by a full disk. When another one
forgets such a text it removes nothing that the first could miss, so it says that it forgets *something*: a note that
holds a random number, written anew before and after the files are gone through. Whoever sees another number than last
time gives up what it knows without a file. No name or digest of what was forgotten is kept.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from . import files

NAME = ".forgotten"
_LENGTH = 32
_ABSENT = b"absent"


class Forgettings:
    """The note of one folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME

    def last(self) -> bytes:
        """Another value than before when something was forgotten since; one small file is read."""
        try:
            return files.read_head(self._path, _LENGTH)
        except OSError:
            return _ABSENT

    def note(self) -> None:
        """Something is being forgotten. Raises OSError when nobody can be told."""
        try:
            files.publish(self._path, secrets.token_hex(_LENGTH // 2).encode(), sync=False)
        except OSError:  # on a full disk a file comes or goes all the same, and that says as much
            if self.last() == _ABSENT:
                files.mark(self._path.parent, [self._path.name])
            else:
                files.remove(self._path)
