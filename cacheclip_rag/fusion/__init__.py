"""Which chunks a chunk's KV should be computed with, and which of the results a prompt is given."""

from .fit import Company, Fit, Nearest, Ordered, overlap, suits
from .neighbours import Embed, Neighbourhood, similar
from .paths import LongestPath, Outcome, Workload, simulate
from .usage import Usage
from .variants import FusedVariants

__all__ = [
    "Company",
    "Embed",
    "Fit",
    "FusedVariants",
    "LongestPath",
    "Nearest",
    "Neighbourhood",
    "Ordered",
    "Outcome",
    "Usage",
    "Workload",
    "overlap",
    "similar",
    "simulate",
    "suits",
]
