"""Soft tokens of a model: trained vectors that enter it like the embeddings of tokens, under negative ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError
from ..prompt.soft import KINDS, SoftKind


@dataclass(frozen=True, eq=False)
class SoftVectors:
    """Trained vectors ``before [h, d]`` and ``behind [t, d]`` each chunk, float32, of this ``kind``."""

    kind: SoftKind
    before: Tensor
    behind: Tensor

    def save(self, folder: Path) -> None:
        """Write ``links.safetensors`` or ``packet.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"before": self.before, "behind": self.behind}
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, _file(folder, self.kind))


class SoftEmbedding(nn.Module):
    """A model's input embeddings, ``inner``, and ``vectors [k, d]``: the id -1 is the first of these, -2 the second.

    Source: prompt tuning (arXiv 2104.08691).
    """

    def __init__(self, inner: nn.Module, vectors: Tensor) -> None:
        super().__init__()
        self.inner, self.vectors = inner, nn.Parameter(vectors)

    def forward(self, ids: Tensor) -> Tensor:
        soft = ids < 0
        known = self.inner(ids.masked_fill(soft, 0))
        vectors = nn.functional.embedding((-1 - ids).clamp_min(0), self.vectors).to(known.dtype)
        return torch.where(soft[..., None], vectors, known)


def with_vectors(model: PreTrainedModel, vectors: Tensor) -> SoftEmbedding:
    """Give a model these soft tokens; it is changed. Returns its input embeddings. The lm head stays as it is."""
    embedding = SoftEmbedding(model.get_input_embeddings(), vectors)
    model.set_input_embeddings(embedding)
    return embedding


def kind_of(folder: str | Path) -> SoftKind | None:
    """What kind of soft tokens a folder holds, or None."""
    return next((kind for kind in KINDS if _file(Path(folder), kind).is_file()), None)


def read_vectors(folder: Path, width: int) -> SoftVectors | None:
    """The soft tokens in a folder, or None. ``width``: the size d of the model's embeddings.

    Raises `ConfigurationError` for a damaged file, and for one of another model.
    """
    if (kind := kind_of(folder)) is None:
        return None
    file = _file(folder, kind)
    try:
        found = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}") from error
    parts = [found.get(name) for name in ("before", "behind")]
    if any(part is None or part.dim() != 2 or part.shape[1] != width for part in parts):
        raise ConfigurationError(f"{file} holds no soft tokens of this model, whose embeddings have {width} numbers")
    before, behind = (part.float() for part in parts if part is not None)
    if not (before.isfinite().all() and behind.isfinite().all()) or not len(before) + len(behind):
        raise ConfigurationError(f"{file} is damaged: it has none, or numbers that are not finite")
    return SoftVectors(kind, before, behind)


def _file(folder: Path, kind: SoftKind) -> Path:
    return folder / f"{kind}.safetensors"
