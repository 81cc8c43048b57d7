"""What was trained of a model: LoRA adapters, merged into a model that shares its other weights, and soft tokens."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Container, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from ..errors import ConfigurationError
from ..prompt.soft import SoftKind
from .backbone import Backbone
from .decode_weights import FewRowsLinear
from .packed import PackedLinear, pack
from .soft import kind_of, read_vectors, with_vectors

log = logging.getLogger("cacheclip_rag")

CARD = "card.json"
"""What an adapter was trained on and for; `cacheclip tune` writes it."""

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def library_version() -> str:
    """The version of this library that is written into a card."""
    try:
        return version("cacheclip-rag")
    except PackageNotFoundError:  # a checkout that was never installed
        return "0+unknown"


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a LoRA adapter in peft's format."""
    return (Path(folder) / _CONFIG).is_file()


def is_trained(folder: str | Path) -> bool:
    """Whether a folder holds what `cacheclip tune` trains of a model, and not a model."""
    if is_adapter(folder) or kind_of(folder) is not None:
        return True
    return (Path(folder) / CARD).is_file() and not (Path(folder) / "config.json").exists()


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card of a trained folder; empty without one. Raises `ConfigurationError` for a damaged card."""
    try:
        card = json.loads((Path(folder) / CARD).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{Path(folder) / CARD} cannot be read: {error}") from error
    if not isinstance(card, dict):
        raise ConfigurationError(f"{Path(folder) / CARD} is no card: train the adapter again")
    return card


def check_card(card: Mapping[str, Any], backbone: Backbone, folder: str | Path) -> None:
    """Raises `ConfigurationError` if the card in ``folder`` names another model than this one. Logs a warning without a
    card, and for one of another version of this library.
    """
    if not card:
        log.warning("%s has no %s: whether it was trained for this model cannot be told", folder, CARD)
        return
    primary = card.get("primary")
    primary = primary if isinstance(primary, dict) else {}
    mine = backbone.origin()
    if backbone.dtype == torch.float16:
        del mine["weights"]
    if other := [name for name, value in mine.items() if primary.get(name) != value]:
        raise ConfigurationError(
            f"{folder} was trained for another model, {primary.get('name', 'unknown')} (it differs in "
            f"{', '.join(other)}): open that model, or train one for this: cacheclip tune"
        )
    if (theirs := card.get("library")) != library_version():
        log.warning("%s was trained with cacheclip-rag %s, this is %s", folder, theirs, library_version())


def check_fitted(folder: Path, backbone: Backbone) -> None:
    """Logs a warning if ``folder`` is an auxiliary model's that was fitted to another model than ``backbone``'s."""
    fitted = read_card(folder).get("fitted_to")
    if isinstance(fitted, dict) and any(fitted.get(name) != value for name, value in backbone.origin().items()):
        log.warning("%s was fitted to another model, %s: it may select worse here", folder, fitted.get("name"))


def twin(model: PreTrainedModel, apart: Container[str] = ()) -> PreTrainedModel:
    """A copy of a model that shares its weights, but for those of the modules named in ``apart``, which are copied, and
    no longer packed, nor in 4 bits beside.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shared = {id(tensor): tensor for name, tensor in tensors if name.rpartition(".")[0] not in apart}
    copied = copy.deepcopy(model, shared)
    for name, module in list(copied.named_modules()):
        if name in apart and isinstance(module, (PackedLinear, FewRowsLinear)):
            copied.set_submodule(name, module.unpacked())
    return copied


def with_adapter(backbone: Backbone, folder: str | Path, soft: SoftKind | None = None) -> Backbone:
    """The model of ``backbone`` with what was trained in ``folder``: a LoRA adapter in peft's format, merged into its
    weights, and soft tokens, which `Backbone.soft` counts. ``soft``: the kind of soft tokens that must be there.

    Weights that the adapter does not change are shared with ``backbone``, which stays as it is; the others are a copy.
    Raises `ConfigurationError` for a folder without an adapter, or with one of another model or kind, and without peft.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigurationError(f"there is no folder {folder}: an adapter is the folder that cacheclip tune wrote")
    card = read_card(folder)
    if (kind := kind_of(folder)) != soft:
        if kind is None:
            raise ConfigurationError(f"{folder} holds no {soft}.safetensors: cacheclip tune {soft} trains it")
        uses = str(card.get("uses", "")).replace("FOLDER", str(folder))
        raise ConfigurationError(
            f"{folder} was trained by cacheclip tune {kind}, for another method{uses and f': use it as {uses}'}"
        )
    missing = [name for name in (_CONFIG, _WEIGHTS) if not (folder / name).is_file()]
    if missing and not (kind and len(missing) == 2):
        raise ConfigurationError(f"{folder} holds no LoRA adapter: it has no {' and no '.join(missing)}")
    check_card(card, backbone, folder)
    vectors = read_vectors(folder, backbone.model.get_input_embeddings().weight.shape[1])
    model = twin(backbone.model) if missing else _merged(backbone, folder)
    if vectors is not None:
        with_vectors(model, torch.cat([vectors.before, vectors.behind]).to(backbone.device, backbone.dtype))
    adapted = Backbone(model.eval(), backbone.tokenizer, attention=backbone.attention)
    adapted.soft = (0, 0) if vectors is None else (len(vectors.before), len(vectors.behind))
    return adapted


def _merged(backbone: Backbone, folder: Path) -> PreTrainedModel:
    """The model with the LoRA adapter in ``folder`` merged. Raises `ConfigurationError`."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ConfigurationError(f"an adapter needs peft ({error}): pip install 'cacheclip-rag[train]'") from error
    shared = [*backbone.model.parameters(), *backbone.model.buffers()]
    wanted = [tensor.requires_grad for tensor in shared]
    try:
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            names = set(file.keys())
        changed = {".".join(name.removeprefix("base_model.model.").split(".")[:-2]) for name in names}
        adapted = PeftModel.from_pretrained(twin(backbone.model, changed), str(folder))
        if names != set(get_peft_model_state_dict(adapted, save_embedding_layers=False)):
            raise ConfigurationError("its weights are for other layers than this model has")
        merged: PreTrainedModel = adapted.merge_and_unload()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, SafetensorError) as error:
        raise ConfigurationError(f"{folder} holds no adapter that fits this model: {error}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"{folder} holds no adapter that fits this model: {error}") from None
    finally:
        for tensor, grad in zip(shared, wanted, strict=True):  # peft freezes what it is given
            tensor.requires_grad_(grad)
    if any(isinstance(module, PackedLinear) for module in backbone.model.modules()):
        pack(merged)
    return merged
