"""Block-Attention's and TurboRAG's training: LoRA under the attention mask that reuse of stored KV amounts to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from cacheclip_eval.data import Item, prompt
from torch import Tensor, nn

from cacheclip_rag.errors import ConfigurationError, NotComposable
from cacheclip_rag.methods import Method
from cacheclip_rag.model.adapter import twin
from cacheclip_rag.model.backbone import Backbone

from .rows import Rows, full_rows, rows_of


class Adapted:
    """A LoRA adapter of a primary model, trained on the answers to questions about passages.

    ``method`` says how passages are encoded and placed. The adapter is in peft's format; the weights of ``backbone``,
    in float32, are shared and stay as they are. ``mixed``: multiply in bfloat16. Raises `NotComposable` for a model
    whose chunks cannot be composed, `ConfigurationError` without peft, and for a model with sliding windows, which the
    mask does not have.
    """

    def __init__(self, backbone: Backbone, method: Method, rank: int, seed: int = 0, mixed: bool = False) -> None:
        if backbone.obstacle is not None:
            raise NotComposable(f"{backbone.obstacle}: its chunks cannot be composed, with trained weights neither")
        if any(window is not None for window in backbone.computer.windows):
            raise ConfigurationError(
                "tune blocks trains models with full attention in every layer, not sliding windows"
            )
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ConfigurationError(f"training needs peft ({error}): pip install 'cacheclip-rag[train]'") from error
        self.backbone, self.method, self.mixed = backbone, method, mixed
        own = twin(backbone.model)
        own.set_attn_implementation("sdpa")
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(own, config)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def rows(self, item: Item, apart: bool) -> Rows:
        """The rows of an item's prompt and answer: with passages encoded ``apart``, or of a full prefill."""
        text = prompt(item, self.backbone)
        end = self.backbone.tokenizer.eos_token_id
        ends = torch.tensor([] if end is None else [end], dtype=torch.long)
        answer = torch.cat([self.backbone.tokenise(item.answers[0], plain=True).ids, ends])
        passages = [passage.chunk for passage in item.passages]
        return (
            rows_of(self.backbone, self.method, text, passages, answer)
            if apart
            else full_rows(self.backbone, text, answer)
        )

    def logits(self, rows: Rows) -> Tensor:
        """The logits ``[A, V]`` float32 that predict the answer's tokens."""
        device = self.backbone.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.mixed):
            output = self.model(
                input_ids=rows.ids[None].to(device),
                position_ids=rows.positions[None].to(device),
                attention_mask=None if rows.mask is None else rows.mask[None, None].to(device),
                use_cache=False,
                logits_to_keep=rows.answer + 1,
            )
        return output.logits[0, :-1].float()

    def loss(self, rows: Rows) -> Tensor:
        """The mean negative log-likelihood of the answer's tokens."""
        return nn.functional.cross_entropy(self.logits(rows), rows.ids[-rows.answer :].to(self.backbone.device))

    def mean_loss(self, rows: Sequence[Rows], untuned: bool = False) -> float:
        """The mean `loss`, with the adapter or, ``untuned``, without it."""
        self.model.eval()
        with torch.no_grad(), self.model.disable_adapter() if untuned else nullcontext():
            return sum(float(self.loss(one)) for one in rows) / len(rows)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(str(folder))


class Blocks:
    """The `loop.Task` of ``cacheclip tune blocks``.

    Every item is an example with its passages encoded apart; with ``joint`` it is another one in full attention, as in
    Block-Attention (arXiv 2409.15355), so that one model does both. The loss is on the answer's tokens only.
    """

    def __init__(self, adapted: Adapted, train: Sequence[Item], stop: Sequence[Item], joint: bool, save: Any) -> None:
        self._adapted, self._train, self._joint, self._save = adapted, train, joint, save
        self.stop_rows = {apart: [adapted.rows(item, apart) for item in stop] for apart in (True, False)}

    @property
    def examples(self) -> int:
        return len(self._train) * (1 + self._joint)

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        return self._adapted.trained

    def loss(self, example: int) -> tuple[Tensor, int]:
        rows = self._adapted.rows(self._train[example % len(self._train)], example < len(self._train))
        self._adapted.model.train()
        return self._adapted.loss(rows), len(rows)

    def held_out(self) -> Mapping[str, float]:
        return {name: self._adapted.mean_loss(self.stop_rows[apart]) for name, apart in _NAMES}

    def save(self, history: Sequence[Mapping[str, Any]]) -> None:
        self._save(history)


_NAMES = (("encoded apart", True), ("full attention", False))


def report(adapted: Adapted, items: Sequence[Item]) -> Iterator[tuple[str, float]]:
    """The mean loss on items that decided nothing: tuned and untuned, encoded apart and in full attention."""
    for name, apart in _NAMES:
        rows = [adapted.rows(item, apart) for item in items]
        for untuned in (True, False):
            yield f"{'untuned' if untuned else 'tuned'}, {name}", adapted.mean_loss(rows, untuned)
