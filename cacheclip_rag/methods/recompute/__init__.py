"""Online: how the chosen rows are carried through the layers. One way a file."""

from .base import Recompute
from .carry import Carry
from .early_stop import EarlyStop
from .once import Once
from .reselect import Reselect

__all__ = ["Carry", "EarlyStop", "Once", "Recompute", "Reselect"]
