"""A model by any name that weights have: of the catalogue, a hub id, a folder, a GGUF file, or a trained folder."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import ConfigurationError
from ..model.adapter import check_card, is_adapter, is_trained, read_card, with_adapter
from ..model.backbone import Backbone
from ..model.decode_weights import Format
from ..model.soft import kind_of
from .pull import resolve


def open_backbone(
    name: str | Path,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "auto",
    decode_weights: Format = "auto",
) -> Backbone:
    """Load the model ``name``. A folder that `cacheclip tune` wrote stands for the model that its card names, with the
    adapter merged if it is one; `Backbone.trained` is that folder.

    Raises `WeightsError`, and `ConfigurationError` for an unknown name and for a folder that does not fit.
    """
    if not is_trained(name):
        return Backbone.load(resolve(str(name)), dtype=dtype, device=device, decode_weights=decode_weights)
    primary = read_card(name).get("primary")
    base = primary.get("name") if isinstance(primary, dict) else None
    if not isinstance(base, str) or is_trained(base):
        raise ConfigurationError(f"{name} has no card that names its model: give the model, and adapter={name}")
    if kind_of(name) is not None:
        uses = str(read_card(name).get("uses", "")).replace("FOLDER", str(name))
        raise ConfigurationError(f'{name} holds soft tokens, and no model: open {base}, with method="{uses}"')
    backbone = Backbone.load(resolve(base), dtype=dtype, device=device, decode_weights=decode_weights)
    if is_adapter(name):
        backbone = with_adapter(backbone, name)
    else:
        check_card(read_card(name), backbone, name)
    backbone.trained = Path(name)
    return backbone
