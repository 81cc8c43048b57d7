"""Which chunks meet in prompts: counted as they come, so that they can be fused with those they really meet."""

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
"""The chance to stand in front that is left to a chunk that stood behind both times."""


class Usage:
    """How often each chunk came in prompts, and how often which others stood in front of it.

    Chunks go by their names in the index, so no text is kept. Bounded: of more than ``chunks`` the least recently seen
    are dropped, of more than ``companions`` of one chunk the rarest. With a ``path`` the counts outlive the process and
    are added up over processes; they are advice, so a file that is damaged or busy costs counts and nothing else.
    """

    def __init__(self, path: Path | None = None, *, chunks: int = 4096, companions: int = 32) -> None:
        self._path, self._chunks, self._companions = path, chunks, companions
        self._seen: OrderedDict[str, Counter[str]] = OrderedDict()  # a chunk's own count stands under its own name
        self._new: list[tuple[str, ...]] = []
        self._lock, self._saving = threading.Lock(), threading.Lock()
        if path is not None:
            self._seen = self._read()

    def note(self, names: Sequence[str]) -> bool:
        """A prompt held these chunks, in this order. Whether it is time to `save`."""
        names = tuple(dict.fromkeys(names))
        with self._lock:
            self._count(self._seen, names)
            if self._path is not None and names:
                self._new.append(names)
            return bool(self._new) and len(self._new) % _SAVE_EVERY == 0  # after a failure not at every prompt

    def uses(self, name: str) -> int:
        with self._lock:
            return self._seen[name][name] if name in self._seen else 0

    def expected_context(self, name: str, count: int) -> list[str]:
        """The ``count`` chunks that will stand in front of this one most often, the most frequent first.

        A chunk met ``n`` times, ``f`` times in front, is taken to stand there the next time with probability
        ``(f + 1) / (n + 2)`` (Laplace's rule of succession): retrieved chunks come in any order, so one that stood
        behind may well come in front. Where it stood behind each of two times or more, the order is taken to be fixed.
        """
        return self.expected_contexts([name], count)[name]

    def expected_contexts(self, names: Collection[str], count: int) -> dict[str, list[str]]:
        """The `context` of each of these chunks; for many it is sooner than one by one."""
        wanted = set(names)
        behind: dict[str, dict[str, int]] = {name: {} for name in names}
        with self._lock:
            front = {name: dict(self._seen.get(name, {})) for name in names}
            for other, met in self._seen.items():
                for name in wanted & met.keys():
                    behind[name][other] = met[name]
        return {name: _expected(name, front[name], behind[name])[:count] for name in names}

    def hot(self, least: int) -> list[str]:
        """The chunks that came ``least`` times or more, the most frequent first."""
        with self._lock:
            counts = {name: met[name] for name, met in self._seen.items() if met[name] >= least}
        return sorted(counts, key=lambda name: -counts[name])

    def forget(self, names: Collection[str]) -> None:
        gone = set(names)
        with self._lock:
            self._drop(self._seen, gone)
            self._new = [kept for note in self._new if (kept := tuple(n for n in note if n not in gone))]
        self._write(gone)

    def save(self) -> None:
        """Add what was noted since the last time to the file."""
        if self._new:
            self._write(set())

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _count(self, seen: OrderedDict[str, Counter[str]], names: Sequence[str]) -> None:
        for number, name in enumerate(names):
            met = seen.setdefault(name, Counter())
            seen.move_to_end(name)
            met.update(names[: number + 1])
            if len(met) > 2 * self._companions:
                own = met[name]
                met = Counter(dict(met.most_common(self._companions)))
                seen[name] = met | Counter({name: own})
        while len(seen) > self._chunks:
            seen.popitem(last=False)

    @staticmethod
    def _drop(seen: OrderedDict[str, Counter[str]], gone: set[str]) -> None:
        for name in gone:
            seen.pop(name, None)
        for met in seen.values():
            for name in gone & met.keys():  # the smaller of the two is gone through
                del met[name]

    def _write(self, gone: set[str]) -> None:
        """Bring the file up to date: another process may have written since it was read."""
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
                    data = {"format": _FORMAT, "seen": {name: dict(met) for name, met in seen.items()}}
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
            return OrderedDict((str(name), Counter(_counts(met))) for name, met in data["seen"].items())
        except FileNotFoundError:
            return OrderedDict()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.warning("%s is not read: %s", self._path.name, error)
            return OrderedDict()


def _expected(name: str, front: Mapping[str, int], behind: Mapping[str, int]) -> list[str]:
    """Whom ``name`` is expected behind, by how often: it was met so many times in front of it, and behind it."""
    expected: dict[str, float] = {}
    for other in dict.fromkeys((*front, *behind)):
        before = front.get(other, 0)
        times = before + behind.get(other, 0)
        chance = (before + 1) / (times + 2)
        if other != name and chance > _FIXED:
            expected[other] = times * chance
    return sorted(expected, key=lambda other: -expected[other])


def _counts(met: Mapping[str, object]) -> dict[str, int]:
    """What a file says, if it may be true. Raises ValueError."""
    counts: dict[str, int] = {}
    for other, count in met.items():
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 1 << 53:
            raise ValueError(f"{str(count)[:20]!r} is no count")
        counts[str(other)] = count
    return counts
