"""Incremental detokenisation: token ids to text deltas, with stop strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from ..report import Report
from .limit import Cancel

CONTEXT = 32
"""Preceding tokens that new ones are decoded together with."""


class Ending:
    """Whether an answer is still wanted: by its reader, who may `set` this, and by the caller's own ``cancel``."""

    def __init__(self, cancel: Cancel | None = None) -> None:
        self._cancel, self._set = cancel, False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set or (self._cancel is not None and self._cancel.is_set())


class TextStream(Iterator[str]):
    """A streamed answer: iterate for text deltas; ``ids`` and ``report`` are updated with each token.

    Special tokens are not part of the text. The text ends before the first of the ``stop`` strings; what might be the
    beginning of one is held back until the next token decides. `close` ends the request early, as does leaving a
    ``with`` block or dropping the stream, or an exception in ``next``. ``ending``: what the producer of the tokens
    looks at, to end before the next one.
    """

    def __init__(
        self,
        tokens: Iterator[int],
        tokenizer: PreTrainedTokenizerBase,
        report: Report,
        stop: Sequence[str] = (),
        ending: Ending | None = None,
    ) -> None:
        self.ids: list[int] = []
        self.report = report
        self._tokens, self._tokenizer, self._ending = tokens, tokenizer, ending or Ending()
        self._stop = [s for s in stop if s]
        self._text = ""  # decoded so far
        self._sent = 0  # characters of it handed out
        self._settled = ""  # text that can no longer change
        self._anchor = 0  # the first id that is still decoded; `_overlap` characters of it are settled
        self._overlap = 0
        self._done = self._closed = False

    def __next__(self) -> str:
        try:
            return self._next()
        except StopIteration:
            raise
        except BaseException:  # of an interrupted answer nobody can say whether a token is missing
            self.close()
            raise

    def _next(self) -> str:
        while not self._done:
            token = next(self._tokens, None)
            if self._closed:  # by another thread, which could not close the generator while it ran here
                self._close_tokens()
                break
            if token is None:
                self._done = True
                self._decode(final=True)
            else:
                self.ids.append(token)
                self._decode(final=False)
            cut = min((at for s in self._stop if (at := self._text.find(s, self._sent)) >= 0), default=-1)
            if cut >= 0:
                self._text, self._done = self._text[:cut], True
                self.report.finish_reason = "stop"
                self._close_tokens()
            ready = len(self._text) - (0 if self._done else self._held_back())
            if ready > self._sent:
                delta, self._sent = self._text[self._sent : ready], ready
                return delta
        raise StopIteration

    def _decode(self, final: bool) -> None:
        text = self._settled + self._tail()[self._overlap :]
        if final or not text.endswith("\ufffd"):  # else: in the middle of a multi-byte character
            self._text = text
            if len(self.ids) - self._anchor > 2 * CONTEXT:
                self._settle(text)

    def _tail(self) -> str:
        text: str = self._tokenizer.decode(self.ids[self._anchor :], skip_special_tokens=True)
        return text

    def _settle(self, text: str) -> None:
        """Fix the text so far, and decode only new tokens from now on, together with the last `CONTEXT` ones.

        These are needed because a token's text may depend on its predecessors (blanks, bytes of a character).
        """
        anchor, self._anchor = self._anchor, len(self.ids) - CONTEXT
        overlap = self._tail()
        if text.endswith(overlap):
            self._settled, self._overlap = text, len(overlap)
        else:  # they begin in the middle of a character, or lost a blank: try again after another token
            self._anchor = anchor

    def _held_back(self) -> int:
        """The length of the longest suffix of the text that is the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _close_tokens(self) -> None:
        close = getattr(self._tokens, "close", None)
        if close is not None:
            close()

    def close(self) -> None:
        """End the request. A thread that is reading the stream ends it at its next token."""
        self._closed = self._done = True
        self._ending.set()
        try:
            self._close_tokens()
        except ValueError as error:
            if "already executing" not in str(error):
                raise

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
