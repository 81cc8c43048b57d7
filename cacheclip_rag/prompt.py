"""Which spans of a prompt are known chunks, and which of its tokens can take their KV from them.

Recognition is by content: nothing has to travel from a retriever to the model, so threads, async, agents and re-packing
cannot lose it, and only exact text matches.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .chunks import MIN_CHARS, canonical

WINDOW = 32
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
            for offset in range(0, len(text) - WINDOW + 1, WINDOW):
                anchor, place = hash(text[offset : offset + WINDOW]), number << 32 | offset
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
            for offset in range(0, len(text) - WINDOW + 1, WINDOW):
                anchor, place = hash(text[offset : offset + WINDOW]), number << 32 | offset
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
        while position <= end - WINDOW:
            found = None
            if hash(prompt[position : position + WINDOW]) in self._anchors:  # seldom, so this is all that text costs
                found = self._longest(prompt, position, last, end, hints, common)
            if found is None:
                position += 1
                continue
            # A neighbour that overlaps a chunk holds its first lines and the blank ones before: its match begins a
            # little earlier and ends soon. A part of a chunk therefore gives way to a longer match inside it.
            ahead = position + 1
            while ahead <= found.end - WINDOW and not self.whole(found) and self._tries > 0:
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
        known = self._anchors.get(hash(prompt[position : position + WINDOW]))
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
        if text[offset : offset + WINDOW] != prompt[position : position + WINDOW]:
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
        after, limit, step = WINDOW, min(len(text) - offset, right - position), 256
        while after < limit:
            size = min(step, limit - after)
            if text.startswith(prompt[position + after : position + after + size], offset + after):
                after += size
            elif size == 1:
                break
            else:
                step = size // 2
        return Span(position - before, position + after, key, offset - before)


# ---- documents -----------------------------------------------------------------------------------------------------


def documents(
    prompt: str,
    spans: Sequence[Span],
    whole: Callable[[Span], bool],
    control: Collection[str],
    opening: str = "",
    closing: str = "",
) -> list[Span]:
    """What of the known stretches is documents, whose control tokens are text, and not the prompt's own frame.

    A document may quote the chat template, and then the frame of every prompt matches a stretch of it. So what precedes
    the user's text (``opening``) and follows it (``closing``) is none where the prompt begins and ends so; a stretch
    that is not a ``whole`` chunk ends at every control token; and none holds a part of one.
    """
    left = len(opening) if prompt.startswith(opening) else 0
    right = len(prompt) - len(closing) if prompt.endswith(closing) else len(prompt)
    tokens = [match.span() for match in any_of(control).finditer(prompt)] if spans else []
    found = []
    for span in spans:
        start, end = max(span.start, left), min(span.end, right)
        quoted = whole(span) and (start, end) == (span.start, span.end)
        cuts = [(a, b) for a, b in tokens if a < end and b > start and not (quoted and start <= a and b <= end)]
        for begin, stop in zip([start, *(b for _, b in cuts)], [*(a for a, _ in cuts), end], strict=True):
            if stop - begin >= MIN_CHARS:
                found.append(Span(begin, stop, span.key, span.offset + begin - span.start))
    return found


def any_of(control: Collection[str]) -> re.Pattern[str]:
    """Matches any of these tokens, the longest first, since one may begin with another; of none nothing."""
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")


# ---- the question --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """The question's ``text`` and where it stands: characters ``[start, end)`` of the prompt, empty if it does not."""

    text: str
    start: int = 0
    end: int = 0

    def rows(self, layout: Layout) -> Tensor:
        """``[q]`` int64: the tokens without stored KV that it consists of."""
        inside = (layout.offsets[:, 0] < self.end) & (layout.offsets[:, 1] > self.start)
        return (inside & ~layout.reusable).nonzero()[:, 0]


def find_question(
    prompt: str, spans: Sequence[Span], known: str | None, control: Collection[str], closing: str = ""
) -> Question:
    """The question in a prompt: ``known`` where it stands outside the chunks, else what a reader would take for it.

    That is the text behind the last chunk, or, where nothing is there, the text before the first. Control tokens and
    the ``closing`` of the chat template ("assistant") are no question.
    """
    if known and known.strip():
        known = known.strip()
        at = prompt.rfind(known)
        while at >= 0 and any(at < span.end and at + len(known) > span.start for span in spans):
            at = prompt.rfind(known, 0, at + len(known) - 1)
        return Question(known, at, at + len(known)) if at >= 0 else Question(known)
    stop = len(prompt) - len(closing) if closing and prompt.endswith(closing) else len(prompt)
    pieces = [(spans[-1].end, stop), (0, spans[0].start)] if spans else [(0, stop)]
    pattern = any_of(control)
    for start, end in pieces:
        text = pattern.sub(" ", prompt[start:end]).strip()
        if any(character.isalnum() for character in text):
            return Question(text, start, end)
    return Question(prompt[-256:].strip() or "?")


# ---- tokens --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Layout:
    """One prompt, token by token, and where each token's KV can come from.

    ``ids [T]`` int64, ``offsets [T, 2]`` int64 (characters of ``prompt``); ``chunk [T]`` int64: index into ``spans`` of
    the chunk span whose stored KV fits the token, or -1; ``token [T]`` int64: the token's index in that chunk, or -1;
    ``edge [T]`` bool: inside a span, but tokenised differently than in the chunk, so computed afresh.
    """

    prompt: str
    ids: Tensor
    offsets: Tensor
    spans: tuple[Span, ...]
    chunk: Tensor
    token: Tensor
    edge: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def reusable(self) -> Tensor:
        """``[T]`` bool: tokens with stored KV."""
        return self.chunk >= 0

    def runs(self) -> list[tuple[int, int, slice]]:
        """``(span, row, tokens)``: maximal runs of rows that hold consecutive tokens of one span's chunk."""
        chunk, token = self.chunk.numpy(), self.token.numpy()
        rows = np.flatnonzero(chunk >= 0)
        if not len(rows):
            return []
        breaks = (np.diff(rows) != 1) | (np.diff(token[rows]) != 1) | (np.diff(chunk[rows]) != 0)
        starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
        ends = np.concatenate([starts[1:], [len(rows)]])
        return [
            (int(chunk[rows[a]]), int(rows[a]), slice(int(token[rows[a]]), int(token[rows[b - 1]]) + 1))
            for a, b in zip(starts, ends, strict=True)
        ]


def align(
    prompt: str,
    ids: Tensor,
    offsets: Tensor,
    spans: Sequence[Span],
    tokens: Sequence[tuple[Tensor, Tensor] | None],
) -> Layout:
    """Match the prompt's tokens with the stored ones of each span's chunk.

    ``ids [T]``, ``offsets [T, 2]``: one tokenisation of the whole prompt, the one a model without cache would see.
    ``tokens[i]`` is ``(ids [n], offsets [n, 2])`` of span i's chunk, or None if its KV is missing. A token is reusable
    when it lies inside the span and the stored chunk has the same id at the same characters; where the neighbouring
    text made the tokenizer cut differently (a token or two at an edge) it is not, and is computed.
    """
    count = len(ids)
    chunk = np.full(count, -1, dtype=np.int64)
    token = np.full(count, -1, dtype=np.int64)
    edge = np.zeros(count, dtype=bool)
    characters = offsets.numpy()
    starts = np.searchsorted(characters[:, 0], [span.start for span in spans])
    stops = np.searchsorted(characters[:, 0], [span.end for span in spans])
    for number, (span, stored) in enumerate(zip(spans, tokens, strict=True)):
        rows = slice(int(starts[number]), int(stops[number]))
        if stored is None or rows.start == rows.stop or not len(stored[0]):
            continue
        mine = _codes(characters[rows] - (span.start - span.offset))
        theirs = _codes(stored[1].numpy())
        order = np.argsort(theirs, kind="stable")
        place = order[np.searchsorted(theirs, mine, sorter=order).clip(max=len(theirs) - 1)]
        same = (theirs[place] == mine) & (stored[0].numpy()[place] == ids.numpy()[rows])
        same &= characters[rows, 1] <= span.end
        chunk[rows] = np.where(same, number, -1)
        token[rows] = np.where(same, place, -1)
        edge[rows] = ~same & (characters[rows, 1] > characters[rows, 0])  # a begin-of-sequence token has no characters
    return Layout(
        prompt,
        ids,
        offsets,
        tuple(spans),
        torch.from_numpy(chunk),
        torch.from_numpy(token),
        torch.from_numpy(edge),
    )


def _codes(offsets: np.ndarray) -> np.ndarray:
    """One int64 for each token's span and its place among the tokens that share it (the bytes of an emoji).

    That place is a number and how many they are: where a first byte was merged into the token before, the others are
    not the same bytes any more.
    """
    if not len(offsets):
        return np.zeros(0, dtype=np.int64)
    repeats = np.concatenate([[False], (offsets[1:] == offsets[:-1]).all(axis=1)])
    first = np.flatnonzero(~repeats)
    size = np.diff(np.append(first, len(offsets)))
    rank = np.arange(len(offsets)) - np.repeat(first, size)
    length = (offsets[:, 1] - offsets[:, 0]).clip(max=0xFFF)
    codes: np.ndarray = (offsets[:, 0] << 28) + (length << 16) + (rank.clip(max=0xFF) << 8)
    return codes + np.repeat(size, size).clip(max=0xFF)
