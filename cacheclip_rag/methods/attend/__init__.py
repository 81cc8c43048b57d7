"""Online: how the question (and what is recomputed) weighs the context. One way a file."""

from .base import Attend, Plain
from .scaled import Scaled
from .selected_chunks import SelectedChunks

__all__ = ["Attend", "Plain", "Scaled", "SelectedChunks"]
