"""Online: which context tokens are worth recomputing. One selector a file."""

from .base import Selector
from .budget import top, windows
from .cacheblend import KeyDeviation
from .cacheclip import CacheClip
from .cachecraft import InterAttentionTokens
from .epic import LeadingTokens
from .everything import Everything
from .nothing import Nothing
from .query_guided import QueryGuided
from .random import Random

__all__ = [
    "CacheClip",
    "Everything",
    "InterAttentionTokens",
    "KeyDeviation",
    "LeadingTokens",
    "Nothing",
    "QueryGuided",
    "Random",
    "Selector",
    "top",
    "windows",
]
