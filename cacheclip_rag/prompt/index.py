"""Known chunks in prompts, found by content.

Nothing has to travel from a retriever to the model, so threads, async, agents and re-packing cannot lose it, and only
exact text matches.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice

from ..chunks import MIN_CHARS, canonical
from .quoted import WholeTexts
from .rendered import Stretch

ANCHOR_LENGTH = 32
"""Anchors are the chunk's windows of 32 characters at 0, 32, 64, ...: any common stretch of 63 characters holds one."""
MAX_CANDIDATES = 32
"""An anchor shared by more chunks than this is boilerplate and is looked at only when nothing better covers it."""
MAX_TRIES = 4096
"""Matches that are tried in one prompt, and one more for every 64 characters, before recognition takes the first one
that it finds at each place. Text that repeats itself (a ruled line, zeros, base64) matches itself at every shift, and
all of them would be tried; three hundred chunks that begin alike take a fiftieth of that many."""
MAX_COMPARED, COMPARED_EACH = 1 << 22, 16
"""Characters that are compared for those matches in one prompt, and for each character of it, before the same."""


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

    def __init__(self, quotes: Callable[[str], bool] | None = None) -> None:
        """``quotes`` says whether a text holds control tokens (`PromptTokenizer.quotes`), for `quoted`."""
        self._texts: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
        self._keys: list[str | None] = []
        self._free: list[int] = []  # numbers of chunks that were removed
        # hash of a window -> chunk number << 32 | offset, or several in order. Hashes only nominate; text decides.
        self._anchors: dict[int, int | dict[int, None]] = {}
        self._quotes = quotes
        self._quoting = WholeTexts()
        # Of the prompt that `find` is looking at:
        self._tries = self._most = 0  # matches that may still be tried, characters that may be compared for them
        self._shared: list[int] = []  # where it holds windows that more than MAX_CANDIDATES chunks share
        self._hinted: dict[int, list[int]] | None = None  # places of the hinted chunks' windows
        self._few: dict[int, list[int]] = {}  # those of windows of many chunks that are looked at
        self.compared = 0
        """Characters that the last `find` compared."""
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
            number = self._free.pop() if self._free else len(self._keys)
            self._keys[number : number + 1] = [key]
            self._texts[key], self._numbers[key] = text, number
            for anchor, place in self._places(text, number):
                known = self._anchors.get(anchor)
                if known is None:
                    self._anchors[anchor] = place
                elif isinstance(known, int):
                    self._anchors[anchor] = {known: None, place: None}
                else:
                    known[place] = None
            if self._quotes is not None and self._quotes(text):
                self._quoting.add(key, text)

    def remove(self, key: str) -> None:
        with self._lock:
            text = self._texts.pop(key, None)
            if text is None:
                return
            number = self._numbers.pop(key)
            self._keys[number] = None
            self._free.append(number)
            for anchor, place in self._places(text, number):
                known = self._anchors[anchor]
                if isinstance(known, int):
                    del self._anchors[anchor]
                    continue
                del known[place]
                if len(known) == 1:
                    self._anchors[anchor] = next(iter(known))
            self._quoting.remove(key)

    @staticmethod
    def _places(text: str, number: int) -> Iterator[tuple[int, int]]:
        """The hash and the place of each of a chunk's anchors."""
        for offset in range(0, len(text) - ANCHOR_LENGTH + 1, ANCHOR_LENGTH):
            yield hash(text[offset : offset + ANCHOR_LENGTH]), number << 32 | offset

    def find(self, prompt: str, hints: Collection[str] = ()) -> list[Span]:
        """The known stretches of ``prompt``, disjoint and in order; what lies between them is unknown text.

        Greedy from the left, the longest match at each place; of equal ones a hinted key wins, then the chunk that is
        there whole, then the match nearest to its chunk's start. Windows that more than `MAX_CANDIDATES` chunks share
        are looked at in a second pass over what the first left open, since a longer match from a rarer neighbouring
        window usually covers them.

        The work is bounded by the prompt's length, whatever it and the chunks hold: once `MAX_TRIES` matches are tried
        or `MAX_COMPARED` characters compared, the first match at each place is taken, so that some may be shorter than
        they could be.
        """
        with self._lock:
            self._tries = MAX_TRIES + len(prompt) // 64
            self.compared, self._most = 0, MAX_COMPARED + COMPARED_EACH * len(prompt)
            self._shared, self._hinted, self._few = [], None, {}
            spans = self._scan(prompt, 0, len(prompt), hints, common=False)
            if not self._shared:
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

    def quoted(self, prompt: str) -> list[Stretch]:
        """Where chunks that hold control tokens stand whole in the prompt, however `find` divides it among all: what
        they quote is text there. Disjoint and in order; chunks that overlap or touch make one stretch.
        """
        with self._lock:
            return self._quoting.cover(prompt)

    def _scan(self, prompt: str, start: int, end: int, hints: Collection[str], common: bool) -> list[Span]:
        spans: list[Span] = []
        anchors, shared = self._anchors, self._shared
        last = position = start
        while position <= end - ANCHOR_LENGTH:
            if common:  # the other windows have been looked at
                at = bisect_left(shared, position)
                if at == len(shared) or (position := shared[at]) > end - ANCHOR_LENGTH:
                    break
            known = anchors.get(hash(prompt[position : position + ANCHOR_LENGTH]))
            if known is None:  # nearly always, so this is all that text costs
                position += 1
                continue
            if not (common or isinstance(known, int)) and len(known) > MAX_CANDIDATES:  # left to the second pass
                shared.append(position)
                position += 1
                continue
            found = self._longest(prompt, position, known, last, end, hints)
            if found is None:
                # A chunk that begins on the way has its second anchor behind it.
                position += 1 if self._tries > 0 else ANCHOR_LENGTH
                continue
            # A neighbour that overlaps a chunk holds its first lines and the blank ones before: its match begins a
            # little earlier and ends soon. A part of a chunk therefore gives way to a longer match inside it.
            ahead, part = position + 1, not self.whole(found)
            while part and ahead <= found.end - ANCHOR_LENGTH and self._tries > 0:
                known = anchors.get(hash(prompt[ahead : ahead + ANCHOR_LENGTH]))
                if known is None:
                    pass
                elif not (common or isinstance(known, int)) and len(known) > MAX_CANDIDATES:
                    shared.append(ahead)
                else:
                    other = self._longest(prompt, ahead, known, last, end, hints, besides=found)
                    if other is not None and self._better(other, found, hints):
                        if other.start - found.start >= MIN_CHARS:
                            spans.append(Span(found.start, other.start, found.key, found.offset))
                            last = other.start
                        found, part = other, not self.whole(other)
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
        known: int | dict[int, None],
        left: int,
        right: int,
        hints: Collection[str],
        besides: Span | None = None,
    ) -> Span | None:
        """The best match through the window at ``position``, whose places are ``known``, if it is worth it; another one
        than ``besides``.
        """
        places: Collection[int] = (known,) if isinstance(known, int) else known
        if len(places) > MAX_CANDIDATES:
            places = self._few_of(places, prompt[position : position + ANCHOR_LENGTH], hints)
        if besides is not None:  # that window of it gives the same match again
            number, offset = self._numbers[besides.key], besides.offset + position - besides.start
            places = [p for p in places if p != number << 32 | offset]
        if self._tries <= 0 or self.compared > self._most:
            self._tries, places = 0, list(islice(places, 1))
        self._tries -= len(places)
        best: tuple[int, bool, bool, int] | None = None
        found = None
        for place in places:
            match = self._extend(prompt, position, place, left, right)
            if match is None or match[1] - match[0] < MIN_CHARS or (best is not None and match[1] - match[0] < best[0]):
                continue
            start, end = match
            key, offset = self._keys[place >> 32], (place & 0xFFFFFFFF) + start - position
            assert key is not None
            length = end - start
            rank = (length, key in hints, length == len(self._texts[key]), -offset)
            if best is None or rank > best:
                best, found = rank, Span(start, end, key, offset)
        return found

    def _few_of(self, places: Collection[int], window: str, hints: Collection[str]) -> Collection[int]:
        """The places of a window that are looked at although there are more: those of hinted chunks, then the first."""
        if self._hinted is None:
            self._hinted = {}
            for key in hints:
                if key in self._texts:
                    for anchor, place in self._places(self._texts[key], self._numbers[key]):
                        self._hinted.setdefault(anchor, []).append(place)
        if (few := self._few.get(hash(window))) is None:
            hinted = self._hinted.get(hash(window), [])[:MAX_CANDIDATES]
            few = self._few[hash(window)] = [*hinted, *islice(places, MAX_CANDIDATES - len(hinted))]
        return few

    def _extend(self, prompt: str, position: int, place: int, left: int, right: int) -> tuple[int, int] | None:
        """Where the longest match through the window at ``position`` begins and ends, within ``[left, right)``; None if
        it is too short to count.
        """
        key, offset = self._keys[place >> 32], place & 0xFFFFFFFF
        if key is None:
            return None
        text = self._texts[key]
        compared = ANCHOR_LENGTH
        if text[offset : offset + ANCHOR_LENGTH] != prompt[position : position + ANCHOR_LENGTH]:
            self.compared += compared
            return None  # two windows of one hash
        # Forth and back by steps that double until one fails, and then halve.
        after, limit, step, grows = ANCHOR_LENGTH, min(len(text) - offset, right - position), ANCHOR_LENGTH, True
        while after < limit:
            size = min(step, limit - after)
            compared += size
            if text.startswith(prompt[position + after : position + after + size], offset + after):
                after += size
                step = step * 2 if grows else step
            else:
                limit, step, grows = after + size - 1, max(1, size // 2), False
        before, limit, step, grows = 0, min(offset, position - left), ANCHOR_LENGTH, True
        needed = MIN_CHARS - after
        if needed > 0:
            self.compared += needed
            if needed > limit or not text.startswith(prompt[position - needed : position], offset - needed):
                self.compared += compared
                return None
            before = needed
        while before < limit:
            size = min(step, limit - before)
            compared += size
            if text.startswith(prompt[position - before - size : position - before], offset - before - size):
                before += size
                step = step * 2 if grows else step
            else:
                limit, step, grows = before + size - 1, max(1, size // 2), False
        self.compared += compared
        return position - before, position + after
