"""What the chunk store must know of a model that vLLM serves: its tokens, shapes and identity; no weights."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.model.fingerprint import config_digest
from cacheclip_rag.model.tokenizer import PromptTokenizer

from . import seams

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_BLOCK = 1 << 24


class ServedModel(PromptTokenizer):
    """The model of a vLLM configuration, as `Library` needs to know it. The same in each of vLLM's processes.

    Its KV has a namespace of its own: vLLM rounds RoPE's tables to the model's dtype and computes with other kernels
    than transformers. The number of tensor-parallel ranks is not part of it, since files hold all heads.
    """

    def __init__(self, vllm_config: Any) -> None:
        model, cache = vllm_config.model_config, vllm_config.cache_config
        super().__init__(seams.tokenizer(model))
        self.layers, self.kv_heads, self.head_dim = seams.shape(vllm_config)
        self.dtype: torch.dtype = model.dtype
        self.context_length: int = model.max_model_len
        self.longest: int = vllm_config.scheduler_config.max_num_batched_tokens
        """Rows that one pass takes, and so the longest chunk that can be encoded with its prefix."""
        self._identity = {
            "engine": f"vllm {seams.minor()}",
            "architecture": model.hf_text_config.model_type,
            "weights": weights_digest(seams.weights_folder(model)),
            "config": config_digest(model.hf_config),
            "tokenizer": hashlib.sha256(self.definition.encode()).hexdigest(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": str(model.quantization),
            "cache_dtype": str(cache.cache_dtype),
        }

    def fingerprint(self) -> dict[str, str]:
        """What identifies this model in the namespace of its stored KV."""
        return dict(self._identity)

    def turn(self) -> np.ndarray:
        """The tokens that open the user's turn in the chat template, from the last control token on; empty without."""
        ids = self.tokenise(self.opening).ids
        control = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids)).nonzero()
        return ids[int(control[-1]) :].numpy() if len(control) else ids[:0].numpy()

    def say(self, ids: np.ndarray) -> str:
        """The text of these tokens, without control tokens."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def state(self) -> Hashable:
        """Always the same: nothing changes a model's weights while vLLM serves it."""
        return ""


@functools.lru_cache(maxsize=4)
def weights_digest(folder: Path) -> str:
    """The xxh3 (128 bits, hex) of all weight files in ``folder`` with their names, some 5 GB/s.

    Raises `ConfigurationError` if there are none: without weights to tell one model from another nothing can be stored.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in _WEIGHTS) if folder.is_dir() else [folder]
    if not files or not all(file.is_file() for file in files):
        raise ConfigurationError(
            f"no weight files ({', '.join(_WEIGHTS)}) in {folder}: chunk KV is stored under the digest of the weights, "
            "so serve the model from a folder or from the hub's cache, not with dummy weights"
        )
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(file.name.encode())
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()


def _blocks(file: Path) -> Iterable[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            yield block
