"""Training of what methods of the literature train: LoRA adapters for chunks that are encoded apart."""

from .data import Split, split
from .loop import Settings, TrainingError, train
from .rows import Rows, rows_of

__all__ = ["Rows", "Settings", "Split", "TrainingError", "rows_of", "split", "train"]
