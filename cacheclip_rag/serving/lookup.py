"""Prompt lookup: the next tokens drafted from where the latest ones stood before, in the prompt or in the answer.

Answers in RAG copy from their context. A draft is verified by one forward over all of its rows, which costs less than a
forward for each token, and is dropped from the first token that the model would not have written. So it changes how
fast an answer comes, and not what it is: greedy answers are the same, sampled ones have the same distribution.
Source: prompt lookup decoding, a case of speculative decoding (arXiv 2211.17192) whose draft costs nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEAST = 2
"""Tokens that must match for what followed them to be drafted."""
_LONGEST = 12
"""Tokens that are compared; among longer matches the latest counts."""
_WEIGHT = 0.2
"""Weight of the newest observation in the running means."""
_PAUSE = 8, 128
"""Tokens without a draft after one that did not pay: at first, and at most."""


def draft(ids: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Up to ``most`` tokens that followed the latest occurrence of the longest suffix of ``ids [n]`` before its end.

    Empty where not even the last `LEAST` tokens occur before.
    """
    end = len(ids)
    if most < 1 or end <= LEAST:
        return ids[:0]
    places = np.flatnonzero(ids[: end - 1] == ids[-1])
    found, length = places, 1
    while len(places) and length < _LONGEST:
        if length >= LEAST:
            found = places
        places = places[places >= length]
        places = places[ids[places - length] == ids[end - 1 - length]]
        length += 1
    if length == _LONGEST and len(places):
        found = places
    elif length <= LEAST:
        return ids[:0]
    start = int(found[-1]) + 1
    return ids[start : start + most]


class Lookup:
    """The drafts of one request, as long as they pay.

    With a probability p that a drafted token is right, and passes that take ``a + b k`` seconds for k drafted tokens, a
    draft of k tokens yields ``(1 - p^(k+1)) / (1 - p)`` tokens a pass; the k with the most tokens a second is drafted.
    p, a and b are measured as the request goes.
    """

    def __init__(self, most: int = 10) -> None:
        """``most``: tokens of a draft at most."""
        self.most = most
        self.drafted = self.accepted = 0
        """Tokens so far: drafted, and written by way of a draft."""
        self._right = 0.5
        self._alone: float | None = None  # seconds of a pass without a draft
        self._each = 0.1  # of that, for each drafted token
        self._resume, self._pause = 0, _PAUSE[0]

    def propose(self, ids: NDArray[np.int64], most: int) -> NDArray[np.int64]:
        """The next draft after ``ids [n]``, of at most ``most`` tokens; often empty."""
        most = min(most, self.most)
        if most < 1 or len(ids) < self._resume or self._alone is None:
            return ids[:0]  # how long a pass without a draft takes is measured first
        length = self._length(most)
        if length == 0:  # it does not pay at present: look again after a while
            self._resume, self._pause = len(ids) + self._pause, min(2 * self._pause, _PAUSE[1])
            self._right = max(self._right, 0.4)
            return ids[:0]
        return draft(ids, length)

    def took(self, seconds: float, drafted: int) -> None:
        """Note how long a pass took, with so many drafted tokens."""
        if not drafted:
            self._alone = seconds if self._alone is None else _mean(self._alone, seconds)
        elif self._alone is not None:
            self._each = _mean(self._each, max(0.0, min(2.0, (seconds / max(self._alone, 1e-9) - 1) / drafted)))

    def note(self, drafted: int, accepted: int) -> None:
        """Note how many tokens of a draft were right."""
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted
        if drafted:
            for right in [1.0] * accepted + [0.0] * (accepted < drafted):
                self._right = _mean(self._right, right)
            if accepted == drafted:
                self._pause = _PAUSE[0]

    def _length(self, most: int) -> int:
        p = min(self._right, 0.98)
        rates = [(1 - p ** (k + 1)) / (1 - p) / (1 + self._each * k) for k in range(most + 1)]
        return int(np.argmax(rates))


def _mean(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old)
