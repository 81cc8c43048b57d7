"""Known chunks in prompts, found by content.

Nothing has to travel from a retriever to the model, so threads, async, agents and re-packing cannot lose it, and only
exact text matches.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass

from ..chunks import MIN_CHARS, canonical

ANCHOR_LENGTH = 32
"""Anchors are the chunk's windows of 32 characters at 0, 32, 64, ...: any common stretch of 63 characters holds one."""
MAX_CANDIDATES = 32
"""An anchor shared by more chunks than this is boilerplate and is looked at only when nothing better covers it."""
MAX_TRIES = 4096
"""Matches that are tried in one prompt, and one more for every four characters, before recognition takes the first one
that it finds at each place. Text that repeats itself (a ruled line, zeros, base64) matches itself at every shift, and
all of them would be tried; three hundred chunks that begin alike take a fiftieth of that many."""


@dataclass(frozen=True)
class Span:
    """Characters ``[start, end)`` of a prompt that equal characters from ``offset`` on of the chunk ``key``."""

    start: int
    end: int
    key: str
    offset: int

    def __len__(self) -> int:
        return self.end - self.start


class ChunkIndex:
    """Finds known chunk texts in prompts. Thread-safe."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
        self._keys: list[str | None] = []
        # hash of a window -> chunk number << 32 | offset, or a list of them. Hashes only nominate; text decides.
        self._anchors: dict[int, int | list[int]] = {}
        self._boilerplate = 0  # anchors that more than MAX_CANDIDATES chunks share
        self._tries = 0  # matches that `find` may still try in its prompt
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._texts)

    def __contains__(self, key: str) -> bool:
        return key in self._texts

    def text(self, key: str) -> str | None:
        return self._texts.get(key)

    def texts(self) -> list[str]:
        with self._lock:
            return list(self._texts.values())

    def keys(self) -> list[str]:
        with self._lock:
            return list(self._texts)

    def add(self, key: str, text: str) -> None:
        """Make ``text`` known as ``key``. Texts under `MIN_CHARS` are left out: prefilling them is as quick."""
        text = canonical(text)
        with self._lock:
            if key in self._texts or len(text) < MIN_CHARS:
                return
            number = len(self._keys)
            self._keys.append(key)
            self._texts[key], self._numbers[key] = text, number
            for offset in range(0, len(text) - ANCHOR_LENGTH + 1, ANCHOR_LENGTH):
                anchor, place = hash(text[offset : offset + ANCHOR_LENGTH]), number << 32 | offset
                known = self._anchors.get(anchor)
                if known is None:
                    self._anchors[anchor] = place
                elif isinstance(known, int):
                    self._anchors[anchor] = [known, place]
                else:
                    known.append(place)
                    self._boilerplate += len(known) == MAX_CANDIDATES + 1

    def remove(self, key: str) -> None:
        with self._lock:
            text = self._texts.pop(key, None)
            if text is None:
                return
            number = self._numbers.pop(key)
            self._keys[number] = None
            for offset in range(0, len(text) - ANCHOR_LENGTH + 1, ANCHOR_LENGTH):
                anchor, place = hash(text[offset : offset + ANCHOR_LENGTH]), number << 32 | offset
                known = self._anchors[anchor]
                rest = [] if isinstance(known, int) else [p for p in known if p != place]
                self._boilerplate -= len(rest) == MAX_CANDIDATES
                if rest:
                    self._anchors[anchor] = rest if len(rest) > 1 else rest[0]
                else:
                    del self._anchors[anchor]

    def find(self, prompt: str, hints: Collection[str] = ()) -> list[Span]:
        """The known stretches of ``prompt``, disjoint and in order; what lies between them is unknown text.

        Greedy from the left, the longest match at each place; of equal ones a hinted key wins, then the chunk that is
        there whole, then the match nearest to its chunk's start. Windows that more than `MAX_CANDIDATES` chunks share
        are looked at in a second pass over what the first left open, since a longer match from a rarer neighbouring
        window usually covers them.
        """
        with self._lock:
            self._tries = MAX_TRIES + len(prompt) // 4
            spans = self._scan(prompt, 0, len(prompt), hints, common=False)
            if not self._boilerplate:
                return spans
            gaps, last = [], 0
            for span in spans:
                gaps.append((last, span.start))
                last = span.end
            gaps.append((last, len(prompt)))
            for start, end in gaps:
                if end - start >= MIN_CHARS:
                    spans += self._scan(prompt, start, end, hints, common=True)
        return sorted(spans, key=lambda span: span.start)

    def _scan(self, prompt: str, start: int, end: int, hints: Collection[str], common: bool) -> list[Span]:
        spans: list[Span] = []
        last = position = start
        while position <= end - ANCHOR_LENGTH:
            found = None
            if (
                hash(prompt[position : position + ANCHOR_LENGTH]) in self._anchors
            ):  # seldom, so this is all that text costs
                found = self._longest(prompt, position, last, end, hints, common)
            if found is None:
                position += 1
                continue
            # A neighbour that overlaps a chunk holds its first lines and the blank ones before: its match begins a
            # little earlier and ends soon. A part of a chunk therefore gives way to a longer match inside it.
            ahead = position + 1
            while ahead <= found.end - ANCHOR_LENGTH and not self.whole(found) and self._tries > 0:
                other = self._longest(prompt, ahead, last, end, hints, common, besides=found)
                if other is not None and self._better(other, found, hints):
                    if other.start - found.start >= MIN_CHARS:
                        spans.append(Span(found.start, other.start, found.key, found.offset))
                        last = other.start
                    found = other
                ahead += 1
            spans.append(found)
            last = position = found.end
        return spans

    def whole(self, span: Span) -> bool:
        """Whether it is all of its chunk."""
        return len(span) == len(self._texts.get(span.key, ""))

    @staticmethod
    def _better(other: Span, found: Span, hints: Collection[str]) -> bool:
        hinted = other.key in hints and found.key not in hints
        return len(other) > len(found) or (len(other) == len(found) and other.start == found.start and hinted)

    def _longest(
        self,
        prompt: str,
        position: int,
        left: int,
        right: int,
        hints: Collection[str],
        common: bool,
        besides: Span | None = None,
    ) -> Span | None:
        """The best match through the window at ``position``, if it is worth it; another one than ``besides``."""
        known = self._anchors.get(hash(prompt[position : position + ANCHOR_LENGTH]))
        if known is None:
            return None
        places = [known] if isinstance(known, int) else known
        if len(places) > MAX_CANDIDATES:
            if not common:
                return None
            hinted = [p for p in places if self._keys[p >> 32] in hints]
            places = (hinted + places)[:MAX_CANDIDATES]
        if besides is not None:  # that window of it gives the same match again
            number, offset = self._numbers[besides.key], besides.offset + position - besides.start
            places = [p for p in places if p != number << 32 | offset]
        if self._tries <= 0:
            places = places[:1]
        self._tries -= len(places)
        spans = [span for p in places if (span := self._extend(prompt, position, p, left, right)) is not None]
        best = max(spans, key=lambda s: (len(s), s.key in hints, self.whole(s), -s.offset), default=None)
        return best if best is not None and len(best) >= MIN_CHARS else None

    def _extend(self, prompt: str, position: int, place: int, left: int, right: int) -> Span | None:
        """The longest match through the window at ``position``, within ``[left, right)``."""
        key, offset = self._keys[place >> 32], place & 0xFFFFFFFF
        if key is None:
            return None
        text = self._texts[key]
        if text[offset : offset + ANCHOR_LENGTH] != prompt[position : position + ANCHOR_LENGTH]:
            return None  # two windows of one hash
        before, limit, step = 0, min(offset, position - left), 256
        while before < limit:
            size = min(step, limit - before)
            if text.startswith(prompt[position - before - size : position - before], offset - before - size):
                before += size
            elif size == 1:
                break
            else:
                step = size // 2
        after, limit, step = ANCHOR_LENGTH, min(len(text) - offset, right - position), 256
        while after < limit:
            size = min(step, limit - after)
            if text.startswith(prompt[position + after : position + after + size], offset + after):
                after += size
            elif size == 1:
                break
            else:
                step = size // 2
        return Span(position - before, position + after, key, offset - before)
