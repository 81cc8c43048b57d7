"""The fingerprint that identifies a model in the namespace of its stored KV."""

from __future__ import annotations

import hashlib
import json

import torch
import xxhash
from torch import nn
from transformers import PretrainedConfig

from .state import additions

_COSMETIC = {"transformers_version", "architectures", "torch_dtype", "dtype", "use_cache", "output_attentions"}
"""Configuration fields that do not change a model's KV."""


def fingerprint(model: nn.Module, config: PretrainedConfig, tokenizer: str, dtype: torch.dtype) -> dict[str, str]:
    """Hashes of the weights, the configuration and the ``tokenizer`` (its definition in JSON), and the dtype.

    Names and paths do not identify a model, so weights are hashed as they are in memory (xxh3, some 5 GB/s). The names
    of hooks and adapters are included where there are any.
    """
    weights = xxhash.xxh3_128()
    for name, parameter in sorted(model.state_dict().items()):
        weights.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        weights.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    more = additions(model)
    return {
        **({"additions": hashlib.sha256(json.dumps(more, sort_keys=True).encode()).hexdigest()} if more else {}),
        "architecture": config.model_type,
        "weights": weights.hexdigest(),
        "config": config_digest(config),
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def origin(model: nn.Module, config: PretrainedConfig, tokenizer: str) -> dict[str, str]:
    """What identifies a model whatever dtype it is loaded in: hashes of its weights rounded to bfloat16, of its
    configuration and of its ``tokenizer`` (its definition in JSON).

    An adapter says by it which model it was trained for. A model in float16 has other weights, rounded twice.
    """
    weights = xxhash.xxh3_128()
    for name, parameter in sorted(model.state_dict().items()):
        weights.update(f"{name}{tuple(parameter.shape)}".encode())
        weights.update(parameter.detach().cpu().bfloat16().contiguous().view(-1).view(torch.uint8).numpy())
    return {
        "architecture": config.model_type,
        "weights": weights.hexdigest(),
        "config": config_digest(config),
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
    }


def config_digest(config: PretrainedConfig) -> str:
    """The sha256 (hex) of a model's configuration, without the fields that do not change its KV."""
    fields = {k: v for k, v in config.to_dict().items() if not k.startswith("_") and k not in _COSMETIC}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
