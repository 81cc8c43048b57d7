"""Online: which context tokens are worth recomputing. One selector a file."""

from .base import Request, Selector
from .budget import top, windows
from .cacheclip import CacheClip
from .everything import Everything
from .nothing import Nothing
from .query_guided import QueryGuided

__all__ = ["CacheClip", "Everything", "Nothing", "QueryGuided", "Request", "Selector", "top", "windows"]
