"""Block-Attention's, TurboRAG's and KVLink's training: LoRA under the attention mask that reuse of stored KV is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cacheclip_eval.data import Item, prompt, right_answer
from torch import Tensor, nn

from cacheclip_rag.errors import PromptError
from cacheclip_rag.methods import Method
from cacheclip_rag.prompt import NO_SOFT_TOKENS

from .lora import Lora
from .rows import Rows, full_rows, rows_of

_NAMES = (("encoded apart", True), ("full attention", False))


class Blocks:
    """The `command.Trainee` of ``cacheclip tune blocks`` and ``tune links``: answers to questions about passages.

    ``method`` says how passages are encoded and placed. Every item is an example with its passages encoded apart; with
    ``joint`` it is another one in full attention, as in Block-Attention (arXiv 2409.15355), so that one model does
    both. The loss is the mean negative log-likelihood of the answer's tokens. Soft tokens of ``lora`` are around the
    passages that are encoded apart, and what it is compared with untuned has none.
    """

    unit = "negative log-likelihood of the right answer per token, mean over questions"

    def __init__(self, lora: Lora, method: Method, joint: bool) -> None:
        self.lora, self._method, self._joint = lora, method, joint

    def rows(self, item: Item, apart: bool, untuned: bool = False) -> Rows:
        """The rows of an item's prompt and answer: with passages encoded ``apart``, or of a full prefill."""
        backbone = self.lora.backbone
        text, answer = prompt(item, backbone), right_answer(item, backbone)
        if not apart:
            return full_rows(backbone, text, answer)
        passages = [passage.chunk for passage in item.passages]
        soft = NO_SOFT_TOKENS if untuned or self.lora.soft is None else self.lora.soft.tokens
        return rows_of(backbone, self._method, text, passages, answer, soft)

    def logits(self, rows: Rows) -> Tensor:
        """The logits ``[A, V]`` float32 that predict the answer's tokens."""
        return self.lora.logits(rows, rows.answer + 1)[:-1]

    def fits(self, item: Item) -> bool:
        try:
            return len(right_answer(item, self.lora.backbone)) > 0 and len(self.rows(item, apart=True)) > 0
        except PromptError:
            return False

    def task(self, train: Sequence[Item], stop: Sequence[Item], save: Callable[[Any], None]) -> _Task:
        return _Task(self, train, stop, self._joint, save)

    def report(self, items: Sequence[Item]) -> dict[str, float]:
        """The mean loss, tuned and untuned, encoded apart and in full attention."""
        found = {}
        for name, apart in _NAMES:
            for untuned in (True, False):
                rows = [self.rows(item, apart, untuned) for item in items]
                found[f"{'untuned' if untuned else 'tuned'}, {name}"] = self.mean_loss(rows, untuned)
        return found

    def save(self, folder: Path) -> None:
        self.lora.save(folder)

    def load(self, folder: Path) -> None:
        self.lora.load(folder)

    def loss(self, rows: Rows) -> Tensor:
        answer = rows.ids[-rows.answer :].to(self.lora.backbone.device)
        return nn.functional.cross_entropy(self.logits(rows), answer)

    def mean_loss(self, rows: Sequence[Rows], untuned: bool = False) -> float:
        with self.lora.looking(untuned):
            return sum(float(self.loss(one)) for one in rows) / len(rows)


class _Task:
    def __init__(
        self, blocks: Blocks, train: Sequence[Item], stop: Sequence[Item], joint: bool, save: Callable[[Any], None]
    ) -> None:
        self._blocks, self._train, self._joint, self.save = blocks, train, joint, save
        self._stop = {name: [blocks.rows(item, apart) for item in stop] for name, apart in _NAMES}

    @property
    def examples(self) -> int:
        return len(self._train) * (1 + self._joint)

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        return self._blocks.lora.trained

    def loss(self, example: int) -> tuple[Tensor, int]:
        rows = self._blocks.rows(self._train[example % len(self._train)], example < len(self._train))
        self._blocks.lora.model.train()
        return self._blocks.loss(rows), len(rows)

    def held_out(self) -> Mapping[str, float]:
        return {name: self._blocks.mean_loss(rows) for name, rows in self._stop.items()}
