"""Cache-Craft's selector: the tokens with most attention to the chunks that preceded them when they were computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...errors import ConfigurationError
from ..request import Request
from .budget import top


@dataclass(frozen=True)
class InterAttentionTokens:
    """Cache-Craft: of every chunk the ``ceil(CFO |C_i|)`` tokens with the highest inter-attention, the attention to the
    chunks that preceded it when its KV was computed.

    ``budget="overhead"``: each chunk's fix-up overhead (CFO) says how many, whatever the ratio; ``"ratio"``: the ratio
    says how many, over all chunks together (FusionRAG's simplified Cache-Craft).
    Source: Cache-Craft (arXiv 2502.15734), section 4.
    """

    budget: Literal["overhead", "ratio"] = "overhead"

    needs_auxiliary: ClassVar[bool] = False

    def select(self, request: Request, budget: int) -> Tensor:
        inter_attention, overhead = torch.zeros(2, len(request.rows), dtype=torch.float32)
        for number in request.groups.unique().tolist():
            chunk, mine = request.chunks[number], request.groups == number
            if chunk is None or "inter_attention" not in chunk.extra:
                raise ConfigurationError('this selection needs harvested chunks, as "cachecraft" keeps them')
            token = request.layout.token[request.rows[mine]]
            inter_attention[mine] = chunk.extra["inter_attention"][token]
            overhead[mine] = chunk.extra["overhead"][token]
        if self.budget == "ratio":
            return request.rows[top(inter_attention, budget)]
        chosen = torch.zeros(len(request.rows), dtype=torch.bool)
        for number in request.groups.unique().tolist():
            members = (request.groups == number).nonzero()[:, 0]
            count = int(torch.ceil(overhead[members[0]].double() * len(members) - 1e-6))
            chosen[members[top(inter_attention[members], count)]] = True
        return request.rows[chosen]
