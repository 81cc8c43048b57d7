"""Embeddings without another library: a sentence-transformers model of the mean-pooling kind, run by transformers."""

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

    Raises WeightsError when the model cannot be had.
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
        together = torch.empty(len(texts), vectors[0].shape[1]) if vectors else torch.empty(0, 0)
        together[order] = torch.cat(vectors) if vectors else together
        return together.numpy()

    return embed
