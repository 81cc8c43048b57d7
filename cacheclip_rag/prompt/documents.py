"""Which recognised spans of a prompt are documents, and which belong to the chat template around them."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from itertools import groupby, takewhile

from ..chunks import MIN_CHARS
from .index import Span
from .rendered import Stretch, contents


def documents(
    prompt: str,
    spans: Sequence[Span],
    whole: Callable[[Span], bool],
    control: Collection[str],
    opening: str = "",
    closing: str = "",
    quoted: Sequence[Stretch] = (),
) -> list[Span]:
    """What of the known stretches is documents, whose control tokens are text, and not the prompt's own frame.

    Of a `RenderedPrompt` that is known: documents are what stands in its contents. In a finished prompt control tokens
    are the frame's unless a known chunk stands around them as a whole. So a stretch ends at every control token, but
    for those inside a ``whole`` chunk, or inside ``quoted``: where such chunks stand, in order, though others cover
    parts of them (see `ChunkIndex.quoted`). What precedes the user's text (``opening``) and follows it (``closing``) is
    frame where the prompt begins and ends so: a document may quote the chat template, and then matches every prompt's.
    """
    own = contents(prompt)
    if own is None:
        left = len(opening) if prompt.startswith(opening) else 0
        right = len(prompt) - len(closing) if prompt.endswith(closing) else len(prompt)
        own = ((left, right),)
        tokens = [match.span() for match in any_of(control).finditer(prompt)] if spans else []
    else:
        tokens = []
    stops, ends = [stop for _, stop in tokens], [end for _, end in own]
    found = []
    for span in spans:
        for number in range(bisect_right(ends, span.start), len(own)):
            start, end = max(span.start, own[number][0]), min(span.end, own[number][1])
            if start >= end:
                break
            text = [(start, end)] if (start, end) == (span.start, span.end) and whole(span) else quoted
            cuts = []
            for a, b in (tokens[n] for n in range(bisect_right(stops, start), bisect_left(tokens, (end, 0)))):
                if not _inside(a, b, text):
                    cuts.append((a, b))
            for begin, stop in zip([start, *(b for _, b in cuts)], [*(a for a, _ in cuts), end], strict=True):
                if stop - begin >= MIN_CHARS:
                    found.append(Span(begin, stop, span.key, span.offset + begin - span.start))
    return found


def inside(prompt: str, control: Collection[str], opening: str, closing: str) -> Stretch:
    """What of a finished prompt may be documents as a whole: all but the chat template's control tokens at both ends,
    so that a document which reproduces the prompt's beginning or end does not turn them into text.

    It begins behind the control tokens that the prompt and ``opening`` have in common, or behind all of ``opening``,
    and ends before ``closing``. Where either is missing, the prompt may begin or end with a document: it is all of it.
    """
    most = min(len(prompt), len(opening))
    alike = next((n for n, (a, b) in enumerate(zip(prompt, opening, strict=False)) if a != b), most)
    tokens = any_of(control).finditer(opening, 0, alike)
    left = alike if alike == len(opening) else max((token.end() for token in tokens), default=0)
    right = len(prompt) - len(closing)
    return (left, right) if 0 < left <= right and prompt.endswith(closing) else (0, len(prompt))


def any_of(control: Collection[str]) -> re.Pattern[str]:
    """Matches any of these tokens, the longest first, since one may begin with another; of none nothing."""
    return _any_of(frozenset(control))


@lru_cache(maxsize=16)
def _any_of(control: frozenset[str]) -> re.Pattern[str]:
    return re.compile(_branches(sorted(control - {""})) or r"(?!)")


def _branches(tokens: Sequence[str]) -> str:
    """A pattern of these sorted tokens in which no two branches begin alike: some models have thousands of control
    tokens that do, and an alternation would try them one by one.
    """
    branches = []
    for _, group in groupby(filter(None, tokens), key=lambda token: token[0]):
        alike = list(group)
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(alike[0], alike[-1], strict=False))
        size = sum(1 for _ in shared)
        branches.append(re.escape(alike[0][:size]) + _branches([token[size:] for token in alike]))
    return f"(?:{'|'.join(branches)}){'' if tokens[0] else '?'}" if branches else ""


def _inside(start: int, end: int, stretches: Sequence[Stretch]) -> bool:
    """Whether one of the stretches, in order, holds all of ``[start, end)``."""
    at = bisect_left(stretches, (start + 1, 0)) - 1
    return at >= 0 and end <= stretches[at][1]
