"""Online: which context tokens are worth recomputing. One selector a file."""

from .base import Selector
from .budget import top, windows
from .cacheblend import KeyDeviation
from .cacheclip import CacheClip
from .cachecraft import LeanedTokens
from .epic import ChunkHeads
from .everything import Everything
from .nothing import Nothing
from .query_guided import QueryGuided
from .random import Random

__all__ = [
    "CacheClip",
    "ChunkHeads",
    "Everything",
    "KeyDeviation",
    "LeanedTokens",
    "Nothing",
    "QueryGuided",
    "Random",
    "Selector",
    "top",
    "windows",
]
