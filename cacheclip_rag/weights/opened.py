"""A model by any name that weights have: of the catalogue, a hub id, a folder, a GGUF file, or a trained folder."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import ConfigurationError
from ..model.adapter import is_adapter, read_card, with_adapter
from ..model.backbone import Backbone
from .pull import resolve


def open_backbone(name: str | Path, dtype: torch.dtype | str = "auto", device: str | torch.device = "auto") -> Backbone:
    """Load the model ``name``. The folder of an adapter stands for the model that its card names, with it merged.

    Raises `WeightsError`, and `ConfigurationError` for an unknown name and for an adapter that does not fit.
    """
    if not is_adapter(name):
        return Backbone.load(resolve(str(name)), dtype=dtype, device=device)
    primary = read_card(name).get("primary")
    base = primary.get("name") if isinstance(primary, dict) else None
    if not isinstance(base, str) or is_adapter(base):
        raise ConfigurationError(f"{name} is an adapter whose card names no model: give the model, and adapter={name}")
    return with_adapter(Backbone.load(resolve(base), dtype=dtype, device=device), name)
