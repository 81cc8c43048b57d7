"""From scores to chosen tokens: top-k, and top-k in groups of neighbours, both of exactly the budget."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def top(scores: Tensor, budget: int) -> Tensor:
    """Indices ``[budget]`` of the highest ``scores [N]``, sorted; of equal scores the earlier token wins."""
    return torch.sort(scores, descending=True, stable=True).indices[:budget].sort().values


def top_groups(scores: Tensor, chunks: Tensor, budget: int, size: int = 8, threshold: int = 5) -> Tensor:
    """Indices ``[budget]`` chosen in groups of adjacent tokens, so that numbers and names are recomputed as a whole.

    ``scores [N]`` float, ``chunks [N]`` int64: the chunk of each token; groups do not cross chunk borders. Candidates
    are the ``budget`` highest-scoring tokens. A group of ``size`` tokens with at least ``threshold`` candidates is
    taken as a whole, the highest mean score first; the remaining budget goes to the highest-scoring single tokens, so
    that it is used up exactly. A chunk shorter than ``size`` is one group.
    Source: CacheClip's sliding-window grouping; the threshold and the use of the remaining budget are our reading
    (docs/methods.md).
    """
    count = len(scores)
    if size <= 1 or not 0 < budget < count:
        return top(scores, budget)
    scores = scores.double()
    candidates = torch.zeros(count, dtype=torch.double)
    candidates[top(scores, budget)] = 1.0
    priority = torch.full((count,), float("-inf"), dtype=torch.double)
    for chunk in chunks.unique():
        members = (chunks == chunk).nonzero()[:, 0]
        width = min(size, len(members))
        inside = candidates[members].unfold(0, width, 1).sum(dim=-1)
        mean = scores[members].unfold(0, width, 1).mean(dim=-1)
        mean = mean.masked_fill(inside < min(threshold, width), float("-inf"))
        # A token's priority is that of the best group that contains it.
        padded = F.pad(mean, (width - 1, width - 1), value=float("-inf"))
        priority[members] = padded.unfold(0, width, 1).amax(dim=-1)
    # Two stable sorts instead of a sum: a large offset for groups would cost tiny attention scores their precision.
    alone = priority == float("-inf")
    best = torch.where(alone, scores, priority)
    order = torch.sort(best, descending=True, stable=True).indices
    order = order[torch.sort(alone[order].int(), stable=True).indices]
    return order[:budget].sort().values
