"""CacheBlend's selector: the tokens whose stored keys deviate most from a full prefill's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...spec import at_least
from ..request import Request
from ..scores import LayerKV
from .budget import top

Deviation = Literal["keys", "keys squared", "values squared"]


@dataclass(frozen=True)
class KeyDeviation:
    """CacheBlend: ``dK[t] = mean_h || K_fresh[h, t] - K_stored[h, t] ||_2`` at ``check_layer``.

    The layers before it run over the whole prompt up to its last chunk: ``check_layer / L`` of a full prefill's work.
    The recompute then starts again from layer 0 with the chosen rows. KV of layer 0 does not depend on context, so for
    the default of 1 (counted from 0) this equals continuing from the check layer.
    ``of``: ``"keys"`` is the study's measure (arXiv 2603.20218), ``"keys squared"`` LMCache's (the sum of squares),
    ``"values squared"`` that of the released CacheBlend code. The question is never a candidate, and the budget counts
    context tokens only (our choices: docs/methods.md). Source: CacheBlend (arXiv 2405.16444), one check layer.
    """

    check_layer: int = 1
    of: Deviation = "keys"

    needs_auxiliary: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_least(0, check_layer=self.check_layer)

    def select(self, request: Request, budget: int) -> Tensor:
        return request.rows[top(key_deviation(request, self.check_layer, self.of).cpu(), budget)]


def key_deviation(request: Request, layer: int = 1, of: Deviation = "keys") -> Tensor:
    """The deviation of every row in ``request.rows`` from a full prefill's KV at ``layer``: ``[N]`` float32."""
    layer = min(layer, request.computer.layers - 1)
    rows = torch.arange(int(request.rows[-1]) + 1)
    scratch = request.computer.workspace(len(rows), layers=layer + 1)
    fresh = LayerKV(layer)
    request.computer.forward([request.part(rows, hooks=[fresh], workspace=scratch)], depth=layer + 1, logits=0)
    return request.computer.over_ranks(deviation(request, fresh.keys, fresh.values, layer, of))


def deviation(request: Request, keys: Tensor, values: Tensor, layer: int, of: Deviation = "keys") -> Tensor:
    """The deviation ``[N]`` float32 of ``request.rows`` from the fresh ``keys``, ``values [T, Hk, D]`` of a layer."""
    rows = request.rows.to(keys.device)
    stored_keys, stored_values = request.workspace.placed(layer)
    fresh, stored = (values, stored_values) if of == "values squared" else (keys, stored_keys)
    difference = fresh[rows].float() - stored[rows].float()
    return difference.norm(dim=-1).mean(dim=1) if of == "keys" else difference.square().sum(dim=(1, 2))
