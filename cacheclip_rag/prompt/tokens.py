"""The tokens of a text: ids and character offsets."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """``ids [n]`` int64 and ``offsets [n, 2]`` int64: the character span of each token in the text they came from."""

    ids: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.ids)
