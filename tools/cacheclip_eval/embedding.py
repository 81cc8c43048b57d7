"""Sentence embeddings by mean pooling, with transformers alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, AutoTokenizer

from cacheclip_rag.weights.pull import resolve

MODEL = "all-minilm-l6-v2"


def mean_pooling(name: str = MODEL) -> Callable[[list[str]], npt.NDArray[np.float32]]:
    """``embed(texts) -> [n, d]``: the mean of a text's last hidden states; texts are cut at 256 tokens.

    Raises `WeightsError` if the model cannot be loaded.
    """
    path = resolve(name)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()

    @torch.inference_mode()
    def embed(texts: list[str]) -> npt.NDArray[np.float32]:
        vectors = []
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        for start in range(0, len(order), 32):
            batch = tokenizer(
                [texts[n] for n in order[start : start + 32]],
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            vectors.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
        result = torch.empty(len(texts), vectors[0].shape[1]) if vectors else torch.empty(0, 0)
        result[order] = torch.cat(vectors) if vectors else result
        return result.numpy()

    return embed
