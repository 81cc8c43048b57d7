"""From scores to exactly as many tokens as the budget allows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def top(scores: Tensor, budget: int) -> Tensor:
    """Indices ``[budget]`` of the highest ``scores [N]``, sorted by index; of equal scores the earlier token wins."""
    return torch.sort(scores, descending=True, stable=True).indices[:budget].sort().values


def top_groups(scores: Tensor, chunks: Tensor, budget: int, size: int = 8, threshold: int = 5) -> Tensor:
    """Indices ``[budget]``, chosen in groups of neighbours (single refreshed tokens tear numbers and names apart).

    ``scores [N]`` float, ``chunks [N]`` int64 (chunk numbers; groups never cross a chunk's border, and the tokens of a
    chunk are neighbours). Candidates are the ``budget`` best tokens; a group of ``size`` that holds at least
    ``threshold`` of them is taken whole, best mean score first; what remains of the budget goes to the best single
    tokens, so that the budget is met exactly. A chunk shorter than a group counts as one.
    Source: CacheClip's sliding-window grouping; threshold and topping up are our reading (docs/methods.md).
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
        # A token's priority is that of the best group it lies in.
        padded = F.pad(mean, (width - 1, width - 1), value=float("-inf"))
        priority[members] = padded.unfold(0, width, 1).amax(dim=-1)
    # Ranks, not sums: attention scores are tiny, and whatever is added to them to lift groups would blur them.
    alone = priority == float("-inf")
    best = torch.where(alone, scores, priority)
    order = torch.sort(best, descending=True, stable=True).indices
    order = order[torch.sort(alone[order].int(), stable=True).indices]
    return order[:budget].sort().values
