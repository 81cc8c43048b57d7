"""Which recognised stretches of a prompt are documents, and which belong to the chat template around them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from ..chunks import MIN_CHARS
from .index import Span


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
