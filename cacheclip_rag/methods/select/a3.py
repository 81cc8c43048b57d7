"""A³'s selector: the question's layer-0 queries against the context's layer-0 keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...kv.encode import Isolated
from ..method import Method
from ..request import Request
from .budget import top
from .query_guided import question_scores


@dataclass(frozen=True)
class FirstLayer:
    """A³: ``s[t] = sum_{h, q} softmax_t(q_0 K_0^T / sqrt(D))[h, q, t]``, over the context's keys, at layer 0.

    Keys of layer 0 do not depend on context, so the stored ones equal those of a full prefill, and the pass over the
    question ends in its first layer. Single tokens are taken, the highest scores first.
    Source: A³ (arXiv 2511.17560), after the public reimplementation in KVPacket, which computes layer 0 for all rows.
    """

    needs_auxiliary: ClassVar[bool] = False

    def select(self, request: Request, budget: int) -> Tensor:
        return request.rows[top(question_scores(request, [0], "context").cpu(), budget)]


A3 = Method(
    "a3",
    FirstLayer(),
    Isolated(prefix=""),
    recompute_ratio=0.15,
    about="the question's attention at layer 0, softmax over the context, encoded without a prefix (A³, 2511.17560)",
)
