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
