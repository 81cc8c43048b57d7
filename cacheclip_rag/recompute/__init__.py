"""Online: how the chosen rows are carried through the layers. One way a file."""

from .base import Recompute
from .early_stop import EarlyStop
from .once import Once
from .reselect import Reselect

__all__ = ["EarlyStop", "Once", "Recompute", "Reselect"]
