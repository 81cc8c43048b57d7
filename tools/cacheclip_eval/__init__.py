"""Evaluation of methods against full prefill: data, metrics, a resumable runner, tables and figures."""

from cacheclip_rag.verification import kl

from .data import Item, Passage, prompt, read, spread
from .figures import comparison, summary
from .metrics import Paired, bootstrap, exact_match, f1, normalised_f1, paired, recall
from .runner import run
from .systems import System
from .tables import compare, summarise

__all__ = [
    "Item",
    "Paired",
    "Passage",
    "System",
    "bootstrap",
    "compare",
    "comparison",
    "exact_match",
    "f1",
    "kl",
    "normalised_f1",
    "paired",
    "prompt",
    "read",
    "recall",
    "run",
    "spread",
    "summarise",
    "summary",
]
