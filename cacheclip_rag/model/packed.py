"""Linear layers whose bfloat16 weights are kept in the layout that the CPU's matrix kernels (oneDNN) read.

From weights in their ordinary layout, a decoding step reads memory at a third of its speed, because the kernel arranges
them anew at every call (docs/log.md). The values are the same, and so are results up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError


class PackedLinear(nn.Module):
    """``x [..., in] -> x W^T + b [..., out]`` with ``W [out, in]`` bfloat16 in oneDNN's layout, on the CPU.

    The ordinary weight is not kept; `weight` makes a copy of it. Packed weights can be neither trained nor moved to
    another device or dtype: load the model again for that.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """A copy of the weight ``[out, in]`` in its ordinary layout."""
        return self._packed.to_dense()

    def unpacked(self) -> nn.Linear:
        """An ordinary layer with a copy of the weight; the bias is shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.weight, requires_grad=False), self.bias
        return linear.train(self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        """A copy that shares the packed weight, which never changes."""
        twin = copy.copy(self)
        twin.__dict__ = {k: v if k == "_packed" else copy.deepcopy(v, memo) for k, v in self.__dict__.items()}
        memo[id(self)] = twin
        return twin

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return output

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        raise ConfigurationError(
            "this model's weights are packed for the CPU and cannot be moved or converted: load it again with the "
            "device and dtype you want, or with packed=False"
        )


def pack(model: nn.Module) -> int:
    """Replace the model's bfloat16 linear layers on the CPU by packed ones, one at a time; returns how many.

    0 where the CPU has no bfloat16 instructions. Layers of a subclass of ``nn.Linear`` stay as they are.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    count = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16 and child.weight.device.type == "cpu":
                setattr(module, name, PackedLinear(child))
                count += 1
    return count
