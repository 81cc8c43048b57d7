"""Counts of which chunks precede which in prompts: they say what context to fuse a chunk with."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ..store import files

log = logging.getLogger("cacheclip_rag")

_FORMAT = "cacheclip-rag usage/1"
_MAX_BYTES = 64 << 20
_SAVE_EVERY = 64  # prompts
_FIXED = 1 / 4
"""The estimated probability that a chunk precedes another one after it came behind it both times."""


class Usage:
    """How often each chunk occurred in prompts, and how often each other chunk preceded it.

    Chunks are identified by their keys in the index, so no text is kept. Bounded: beyond ``chunks``, the least recently
    seen chunks are dropped; beyond ``companions`` counts of one chunk, the rarest. With a ``path`` the counts survive
    the process and are summed over processes. They only guide fusing, so a file that is damaged or locked loses counts
    and nothing else.
    """

    def __init__(self, path: Path | None = None, *, chunks: int = 4096, companions: int = 32) -> None:
        self._path, self._chunks, self._companions = path, chunks, companions
        self._seen: OrderedDict[str, Counter[str]] = OrderedDict()  # a chunk's own count is under its own name
        self._new: list[tuple[str, ...]] = []
        self._lock, self._saving = threading.Lock(), threading.Lock()
        if path is not None:
            self._seen = self._read()

    def note(self, names: Sequence[str]) -> bool:
        """Count a prompt with these chunks, in this order. Returns whether it is time to `save`."""
        names = tuple(dict.fromkeys(names))
        with self._lock:
            self._count(self._seen, names)
            if self._path is not None and names:
                self._new.append(names)
            return bool(self._new) and len(self._new) % _SAVE_EVERY == 0  # also after a failure, not at every prompt

    def uses(self, name: str) -> int:
        """The number of prompts with this chunk."""
        with self._lock:
            return self._seen[name][name] if name in self._seen else 0

    def expected_context(self, name: str, count: int) -> list[str]:
        """The ``count`` chunks most likely to precede this one in a prompt, the likeliest first.

        A chunk that occurred with this one ``n`` times, ``f`` times before it, is expected before it with probability
        ``(f + 1) / (n + 2)`` (Laplace's rule of succession), because retrieved chunks come in any order. If it came
        behind this one both times or more often, the order is assumed to be fixed.
        """
        return self.expected_contexts([name], count)[name]

    def expected_contexts(self, names: Collection[str], count: int) -> dict[str, list[str]]:
        """The `expected_context` of each of these chunks; faster than one call per chunk."""
        wanted = set(names)
        behind: dict[str, dict[str, int]] = {name: {} for name in names}
        with self._lock:
            front = {name: dict(self._seen.get(name, {})) for name in names}
            for other, counts in self._seen.items():
                for name in wanted & counts.keys():
                    behind[name][other] = counts[name]
        return {name: _expected(name, front[name], behind[name])[:count] for name in names}

    def hot(self, least: int) -> list[str]:
        """The chunks of at least ``least`` prompts, the most frequent first."""
        with self._lock:
            counts = {name: before[name] for name, before in self._seen.items() if before[name] >= least}
        return sorted(counts, key=lambda name: -counts[name])

    def forget(self, names: Collection[str]) -> None:
        """Drop all counts of these chunks, in the file as well."""
        gone = set(names)
        with self._lock:
            self._drop(self._seen, gone)
            self._new = [kept for note in self._new if (kept := tuple(n for n in note if n not in gone))]
        self._write(gone)

    def save(self) -> None:
        """Add the counts since the last `save` to the file."""
        if self._new:
            self._write(set())

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _count(self, seen: OrderedDict[str, Counter[str]], names: Sequence[str]) -> None:
        for number, name in enumerate(names):
            counts = seen.setdefault(name, Counter())
            seen.move_to_end(name)
            counts.update(names[: number + 1])
            if len(counts) > 2 * self._companions:
                own = counts[name]
                counts = Counter(dict(counts.most_common(self._companions)))
                seen[name] = counts | Counter({name: own})
        while len(seen) > self._chunks:
            seen.popitem(last=False)

    @staticmethod
    def _drop(seen: OrderedDict[str, Counter[str]], gone: set[str]) -> None:
        for name in gone:
            seen.pop(name, None)
        for counts in seen.values():
            for name in gone & counts.keys():  # a set intersection iterates over the smaller of the two
                del counts[name]

    def _write(self, gone: set[str]) -> None:
        """Update the file from its current contents: another process may have written to it."""
        if self._path is None:
            return
        with self._saving:
            with self._lock:
                new, self._new = self._new, []
            try:
                with files.lock(self._path.with_suffix(".lock"), 2.0):
                    seen = self._read()
                    for names in new:
                        self._count(seen, names)
                    self._drop(seen, gone)
                    data = {"format": _FORMAT, "seen": {name: dict(counts) for name, counts in seen.items()}}
                    files.publish(self._path, json.dumps(data).encode(), sync=False)
            except OSError as error:
                log.warning("counts of what is used together could not be kept: %s", error)
                with self._lock:
                    self._new = (new + self._new)[-1024:]

    def _read(self) -> OrderedDict[str, Counter[str]]:
        assert self._path is not None
        try:
            data = json.loads(bytes(files.read(self._path, _MAX_BYTES)))
            if data["format"] != _FORMAT:
                raise ValueError("another format")
            return OrderedDict((str(name), Counter(_counts(counts))) for name, counts in data["seen"].items())
        except FileNotFoundError:
            return OrderedDict()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("%s is not read: %s", self._path.name, error)
            return OrderedDict()


def _expected(name: str, front: Mapping[str, int], behind: Mapping[str, int]) -> list[str]:
    """The chunks expected before ``name``, the likeliest first, from how often each came before and behind it."""
    expected: dict[str, float] = {}
    for other in dict.fromkeys((*front, *behind)):
        before = front.get(other, 0)
        times = before + behind.get(other, 0)
        chance = (before + 1) / (times + 2)
        if other != name and chance > _FIXED:
            expected[other] = times * chance
    return sorted(expected, key=lambda other: -expected[other])


def _counts(read: Mapping[str, object]) -> dict[str, int]:
    """Counts as a file has them. Raises ValueError for anything that cannot be a count."""
    counts: dict[str, int] = {}
    for other, count in read.items():
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 1 << 53:
            raise ValueError(f"{str(count)[:20]!r} is no count")
        counts[str(other)] = count
    return counts
