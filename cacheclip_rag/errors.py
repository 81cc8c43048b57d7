"""What can go wrong, as one tree, so that a caller catches at the level it wants.

CacheClipError
├── ConfigurationError                   an unknown name, a ratio out of range; the message names what is valid
│   └── NotComposable                    a model whose KV cannot be moved or joined
├── PromptError                          an empty prompt, or one that exceeds the model's context window
├── WeightsError                         weights that cannot be found, fetched, verified or converted
└── StoreError                           a chunk store that cannot be opened

A failure *inside* reuse (a damaged file, a mismatch, a failed selection) is none of these: it costs time, never the
answer, and the request's report says what happened.

None is a ValueError: frameworks take one that comes out of a model's call for an answer that does not parse, and go on
without an answer (LlamaIndex's synthesizers say "Empty Response", its sub-question engine drops the question).
"""

from __future__ import annotations

import signal
from types import CodeType
from typing import Any


class CacheClipError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigurationError(CacheClipError):
    """An option is unknown, out of range, or does not go with another one."""


class NotComposable(ConfigurationError):
    """The model's KV depends on more than tokens and relative positions, so chunks cannot be moved and joined."""


class PromptError(CacheClipError):
    """The prompt is empty or does not fit the model's context window."""


class WeightsError(CacheClipError):
    """Model weights could not be found, fetched, verified or converted."""


class StoreError(CacheClipError):
    """The chunk store could not be opened."""


def raised_by_signal(error: BaseException) -> bool:
    """Whether a signal handler raised this, whatever its class: a time limit, say, that has nothing to do with the code
    it interrupted. For those who answer the failures of that code.
    """
    handlers = {code for number in signal.valid_signals() if (code := _code(signal.getsignal(number))) is not None}
    seen: BaseException | None = error
    while seen is not None and handlers:
        trace = seen.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code in handlers:
                return True
            trace = trace.tb_next
        seen = seen.__cause__  # not __context__: that may be what the caller was dealing with
    return False


def _code(handler: Any) -> CodeType | None:
    """The Python code that runs when ``handler`` is called: a function, a method, a partial, an object."""
    for _ in range(8 if callable(handler) else 0):
        code = getattr(handler, "__code__", None)
        if isinstance(code, CodeType):
            return code
        handler = getattr(handler, "func", None) or getattr(handler, "__func__", None) or type(handler).__call__
    return None
