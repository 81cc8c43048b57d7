"""The errors this package raises, as one hierarchy, so that a caller can catch them at any level.

CacheClipError
├── ConfigurationError                   an unknown name, a ratio out of range; the message names what is valid
│   └── NotComposable                    a model whose KV cannot be moved or joined
├── PromptError                          an empty prompt, or one beyond the model's context length
├── WeightsError                         weights that cannot be found, fetched, verified or converted
├── StoreError                           a chunk store that cannot be opened
└── ServerError                          a server that cannot be reached, or that refuses a request

A failure inside reuse (a damaged file, a mismatch, a failed selection) raises none of these. It costs time, never the
answer, and the request's report says what happened.

None of them is a ValueError. Frameworks treat a ValueError out of a model call as an answer that does not parse, and
continue without one (LlamaIndex's synthesizers return "Empty Response", its sub-question engine drops the question).
"""


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


class ServerError(CacheClipError):
    """A server could not be reached, or did not do what it was asked. ``status``: its HTTP status, None without one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
