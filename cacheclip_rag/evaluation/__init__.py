"""Quality against full prefill: data, metrics, and a runner that can be stopped and resumed."""

from .data import Item, Passage, prompt, read, spread
from .metrics import exact_match, f1, kl, recall
from .runner import System, run
from .tables import summarise

__all__ = [
    "Item",
    "Passage",
    "System",
    "exact_match",
    "f1",
    "kl",
    "prompt",
    "read",
    "recall",
    "run",
    "spread",
    "summarise",
]
