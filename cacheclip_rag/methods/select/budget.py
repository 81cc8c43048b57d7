"""From scores to exactly as many tokens as the budget allows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def top(scores: Tensor, budget: int) -> Tensor:
    """Indices ``[budget]`` of the highest ``scores [N]``, sorted by index; of equal scores the earlier token wins."""
    return torch.sort(scores, descending=True, stable=True).indices[:budget].sort().values


def windows(scores: Tensor, groups: Tensor, budget: int, width: int = 8, threshold: int = 5) -> Tensor:
    """Indices ``[budget]``, chosen in contiguous windows (single refreshed tokens tear numbers and names apart).

    ``scores [N]`` float, ``groups [N]`` int64 (chunk numbers; windows never cross a chunk's border, and the tokens of a
    chunk are neighbours). Candidates are the ``budget`` best tokens; a window of ``width`` that holds at least
    ``threshold`` of them is taken whole, best mean score first; what remains of the budget goes to the best single
    tokens, so that the budget is met exactly. A chunk shorter than a window counts as one.
    Source: CacheClip's sliding-window grouping; threshold and topping up are our reading (docs/methods.md).
    """
    count = len(scores)
    if width <= 1 or not 0 < budget < count:
        return top(scores, budget)
    scores = scores.double()
    candidates = torch.zeros(count, dtype=torch.double)
    candidates[top(scores, budget)] = 1.0
    priority = torch.full((count,), float("-inf"), dtype=torch.double)
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        size = min(width, len(members))
        inside = candidates[members].unfold(0, size, 1).sum(dim=-1)
        mean = scores[members].unfold(0, size, 1).mean(dim=-1)
        mean = mean.masked_fill(inside < min(threshold, size), float("-inf"))
        # A token's priority is the best of the windows it lies in.
        padded = F.pad(mean, (size - 1, size - 1), value=float("-inf"))
        priority[members] = padded.unfold(0, size, 1).amax(dim=-1)
    # Ranks, not sums: attention scores are tiny, and whatever is added to them to lift windows would blur them.
    alone = priority == float("-inf")
    best = torch.where(alone, scores, priority)
    order = torch.sort(best, descending=True, stable=True).indices
    order = order[torch.sort(alone[order].int(), stable=True).indices]
    return order[:budget].sort().values
