"""The errors this package raises, as one hierarchy, so that a caller can catch them at any level.

CacheClipError
├── ConfigurationError                   an unknown name, a ratio out of range; the message names what is valid
│   └── NotComposable                    a model whose KV cannot be moved or joined
├── PromptError                          an empty prompt, or one beyond the model's context length
├── WeightsError                         weights that cannot be found, fetched, verified or converted
└── StoreError                           a chunk store that cannot be opened

A failure inside reuse (a damaged file, a mismatch, a failed selection) raises none of these. It costs time, never the
answer, and the request's report says what happened.

None of them is a ValueError. Frameworks treat a ValueError out of a model call as an answer that does not parse, and
continue without one (LlamaIndex's synthesizers return "Empty Response", its sub-question engine drops the question).
"""

from __future__ import annotations

import signal
from types import CodeType
from typing import Any


class CacheClipError(Exception):
    """Base class of the errors that this package raises."""


class ConfigurationError(CacheClipError):
    """An option is unknown, out of range, or contradicts another one."""


class NotComposable(ConfigurationError):
    """The model's KV depends on more than tokens and relative positions, so that chunks cannot be moved and joined."""


class PromptError(CacheClipError):
    """The prompt is empty or exceeds the model's context length."""


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
