"""What identifies a model whose KV is stored."""

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
    """Every weight's bytes, the configuration, the ``tokenizer`` (its definition in JSON) and the dtype.

    A model's name or path is not its identity: weights are hashed as they are in memory (xxh3, some 5 GB/s). Hooks and
    adapters are told by name where there are any.
    """
    weights = xxhash.xxh3_128()
    for name, parameter in sorted(model.state_dict().items()):
        weights.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        weights.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    fields = {k: v for k, v in config.to_dict().items() if not k.startswith("_") and k not in _COSMETIC}
    more = additions(model)
    return {
        **({"additions": hashlib.sha256(json.dumps(more, sort_keys=True).encode()).hexdigest()} if more else {}),
        "architecture": config.model_type,
        "weights": weights.hexdigest(),
        "config": hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest(),
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
        "dtype": str(dtype).removeprefix("torch."),
    }
