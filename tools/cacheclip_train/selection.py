"""CacheClip's auxiliary model, fitted to a primary: LoRA towards the primary's attention from the question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from cacheclip_eval.data import Item
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cacheclip_rag.errors import PromptError
from cacheclip_rag.kv.encode import Isolated

from . import fitting
from .fitting import Fitting, Targets
from .lora import Lora
from .rows import Placed, Rows, composed
from .teacher import Teacher, chunks_of, distribution, over

KEEPING = "cacheclip_keeping"
"""An attention implementation: transformers' sdpa, which hands out the queries and keys of the layers in ``kept``."""


def _keeping(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    kept = options.pop("kept", None)
    if kept is not None and module.layer_idx in kept:
        kept[module.layer_idx] = query, key, options.get("scaling") or query.shape[-1] ** -0.5
    return sdpa_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register(KEEPING, _keeping)


class Selection:
    """The `command.Trainee` of ``cacheclip tune auxiliary``.

    The auxiliary model scores tokens as `methods.auxiliary.Auxiliary` does: chunks encoded apart behind a shared
    prefix, then the question over all of them, mean over heads, question tokens and ``layers`` ("last" or "upper").
    The loss is ``KL(p || q)`` of its distribution over its own tokens from the teacher's, which is spread over
    characters, so that the tokenizers may differ. Source: CacheClip (arXiv 2510.10129), whose training is unpublished.
    """

    unit = fitting.UNIT

    def __init__(self, lora: Lora, teacher: Teacher, layers: str) -> None:
        self.lora, self.targets = lora, Targets(teacher)
        full = lora.backbone.full_layers
        self._layers = full[-1:] if layers == "last" else full[len(full) // 2 :]
        self._prefix = Isolated().prefix_ids(lora.backbone)

    def rows(self, texts: Sequence[str], question: str) -> tuple[Rows, Tensor, Tensor]:
        """The rows of one pass; the indices ``[C]`` of the chunks' tokens among them, and their character spans
        ``[C, 2]``. Raises `PromptError` for what does not fit into one pass.
        """
        backbone, prefix = self.lora.backbone, self._prefix
        asked = backbone.tokenise("\n\n" + question, plain=True).ids
        tokens = [backbone.tokenise(text, plain=True) for text in texts]
        stop = len(prefix) + sum(map(len, tokens))
        if stop + len(asked) > backbone.context_length:
            raise PromptError(f"{stop + len(asked):,} tokens exceed the auxiliary model's context length")
        row, placed, columns, at = len(prefix), list[Placed](), list[Tensor](), 0
        for one in tokens:
            slots = torch.arange(row, row + len(one))
            placed.append(Placed(one.ids, row, slots))
            columns.append(torch.arange(at + len(prefix), at + len(prefix) + len(one)))
            row, at = row + len(one), at + len(prefix) + len(one)
        slots = torch.cat([torch.arange(len(prefix)), torch.arange(stop, stop + len(asked))])
        rows = composed(prefix, placed, torch.cat([prefix, asked]), slots, slots, len(asked))
        return rows, torch.cat(columns), torch.cat([one.offsets for one in tokens])

    def scores(self, rows: Rows, columns: Tensor) -> Tensor:
        """The auxiliary model's attention ``[C]`` float32 from the question to ``columns [C]``, with a gradient."""
        kept: dict[int, Any] = dict.fromkeys(self._layers)
        self.lora.logits(rows, 1, kept=kept)
        assert rows.mask is not None
        hidden = ~rows.mask[-rows.answer :].to(self.lora.backbone.device)
        total = []
        for query, key, scaling in kept.values():
            keys = key[0].float().repeat_interleave(query.shape[1] // key.shape[1], dim=0)
            logits = query[0, :, -rows.answer :].float() @ keys.mT * scaling
            total.append(
                logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)[..., columns.to(keys.device)].mean(dim=(0, 1))
            )
        return torch.stack(total).mean(dim=0)

    def compared(self, item: Item) -> tuple[Tensor, Tensor, int]:
        """The teacher's and the auxiliary model's distributions over its tokens, ``[C]``, and how many rows it took."""
        target = self.targets.of(item)
        rows, columns, offsets = self.rows(list(target), item.question)
        lengths = [len(self.lora.backbone.tokenise(text, plain=True)) for text in target]
        parts = zip(target.values(), offsets.split(lengths), strict=True)
        p = torch.cat([over(mass, spans) for mass, spans in parts])
        return distribution(p), distribution(self.scores(rows, columns).cpu()), len(rows)

    def fits(self, item: Item) -> bool:
        texts = chunks_of(item)
        try:
            return bool(texts) and len(self.rows(texts, item.question)[0]) > 0 and self.targets.has(item)
        except PromptError:
            return False

    def task(self, train: Sequence[Item], stop: Sequence[Item], save: Callable[[Any], None]) -> Fitting:
        return Fitting(self, train, stop, save)

    def report(self, items: Sequence[Item]) -> dict[str, float]:
        return fitting.report(self, items)

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        return self.lora.trained

    def training(self) -> None:
        self.lora.model.train()

    def looking(self, untuned: bool = False) -> AbstractContextManager[None]:
        return self.lora.looking(untuned)

    def save(self, folder: Path) -> None:
        self.lora.save(folder)

    def load(self, folder: Path) -> None:
        self.lora.load(folder)
