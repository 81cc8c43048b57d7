"""A trained head on a frozen auxiliary model: scores a chunk's tokens by more than one layer's attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ConfigurationError

HEAD = "head.safetensors"
"""The file of a head; `cacheclip tune head` writes it."""

PLAIN = 5
"""How many features are not the auxiliary model's."""


class SelectionHead(nn.Module):
    """``score[t] = w gelu(W f[t] + b)`` of a token's features ``f[t] [F]`` (see `features`); a softmax over the context
    makes a distribution of the scores. ``width``: F; ``hidden``: the rows of W.
    """

    def __init__(self, width: int, hidden: int = 32) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """The scores ``[C]`` of tokens with ``features [C, F]``, before the softmax."""
        scores: Tensor = self.outer(F.gelu(self.inner(features)))[:, 0]
        return scores

    def save(self, folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / HEAD)


def features(attention: Tensor, values: Tensor, ids: Tensor, sizes: Sequence[int], question: Tensor) -> Tensor:
    """The features ``[C, L + V + PLAIN]`` float32 of the tokens of chunks, all from what selection has at hand.

    ``attention [L, C]``: the question's to each token, by layer; its logarithm relative to an even one. ``values
    [C, V]``: the last layer's, a projection of the hidden state; normalised. Then, with ``ids [C]`` and those of the
    ``question [q]``: whether the question has the token, how near it is to its chunk's beginning (twice), and its place
    in the chunk and in the context. ``sizes``: tokens of each chunk.
    """
    count = max(1, len(ids))
    relative = (attention.float() * count).clamp_min(1e-4).log().T
    normal = F.layer_norm(values.float(), values.shape[1:])
    place = torch.cat([torch.arange(size) for size in sizes]).float()
    length = torch.cat([torch.full((size,), float(size)) for size in sizes])
    shared = torch.isin(ids, question).float()
    plain = [shared, (-place / 4).exp(), (-place / 32).exp(), place / length, torch.arange(len(ids)) / count]
    return torch.cat([relative.cpu(), normal.cpu(), torch.stack(plain, dim=1)], dim=1)


def read_head(folder: str | Path) -> SelectionHead | None:
    """The head in a folder that `cacheclip tune head` wrote; None without one. Raises `ConfigurationError` for a
    damaged one.
    """
    if not (path := Path(folder) / HEAD).is_file():
        return None
    try:
        state = load_file(path)
        hidden, width = state["inner.weight"].shape
        head = SelectionHead(width, hidden)
        head.load_state_dict(state)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigurationError(f"{path} holds no head of an auxiliary model: {error}") from error
    return head.eval().requires_grad_(False)
