"""KV Packet's training: soft tokens around each chunk, by self-distillation; the model stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cacheclip_eval.data import Item, prompt
from torch import Tensor, nn

from cacheclip_rag.errors import PromptError
from cacheclip_rag.methods import Method
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.prompt import NO_SOFT_TOKENS

from .lora import Lora
from .rows import Rows, full_rows, rows_of


class Packet:
    """The `command.Trainee` of ``cacheclip tune packet``.

    The teacher is the model itself in a full prefill. Its own greedy answer, of at most ``length`` tokens, is what both
    predict; the loss is ``KL(p || q)`` in nats, mean over the answer's tokens, p the teacher's distribution and q that
    behind chunks in packets. Source: KV Packet (arXiv 2604.13226) and its code.
    """

    unit = "KL from the full prefill, in nats per token of its own answer, mean over questions"

    def __init__(self, lora: Lora, method: Method, length: int) -> None:
        self.lora, self._method, self._length = lora, method, length
        self._answers: dict[str, Tensor] = {}

    def answer(self, item: Item) -> Tensor:
        """The teacher's greedy answer ``[A]`` int64, ended by its end-of-sequence token unless it is cut off."""
        if item.id not in self._answers:
            backbone = self.lora.backbone
            self._answers[item.id] = greedy(backbone, prompt(item, backbone), self._length)
        return self._answers[item.id]

    def rows(self, item: Item, untuned: bool = False) -> Rows:
        """The rows of an item's prompt and answer, its passages in packets; ``untuned``: without header and trailer."""
        assert self.lora.soft is not None
        soft = NO_SOFT_TOKENS if untuned else self.lora.soft.tokens
        passages = [passage.chunk for passage in item.passages]
        backbone = self.lora.backbone
        return rows_of(backbone, self._method, prompt(item, backbone), passages, self.answer(item), soft)

    def loss(self, item: Item, untuned: bool = False) -> tuple[Tensor, int]:
        """The loss of an item, and how many rows both forwards took."""
        backbone = self.lora.backbone
        apart, whole = self.rows(item, untuned), full_rows(backbone, prompt(item, backbone), self.answer(item))
        with torch.no_grad():
            teacher = self.lora.logits(whole, whole.answer + 1)[:-1].log_softmax(dim=-1)
        student = self.lora.logits(apart, apart.answer + 1)[:-1].log_softmax(dim=-1)
        kl = nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1).mean()
        return kl, len(apart) + len(whole)

    def mean_loss(self, items: Sequence[Item], untuned: bool = False) -> float:
        with self.lora.looking():
            return sum(float(self.loss(item, untuned)[0]) for item in items) / len(items)

    def fits(self, item: Item) -> bool:
        backbone, longest = self.lora.backbone, torch.zeros(self._length, dtype=torch.long)
        assert self.lora.soft is not None
        passages = [passage.chunk for passage in item.passages]
        try:
            rows_of(backbone, self._method, prompt(item, backbone), passages, longest, self.lora.soft.tokens)
        except PromptError:
            return False
        return True

    def task(self, train: Sequence[Item], stop: Sequence[Item], save: Callable[[Any], None]) -> _Task:
        return _Task(self, train, stop, save)

    def report(self, items: Sequence[Item]) -> dict[str, float]:
        """The mean loss with packets, and of chunks as they are."""
        return {
            f"{name}, KL": self.mean_loss(items, untuned) for name, untuned in (("untuned", True), ("tuned", False))
        }

    def save(self, folder: Path) -> None:
        self.lora.save(folder)

    def load(self, folder: Path) -> None:
        self.lora.load(folder)


class _Task:
    def __init__(
        self, packet: Packet, train: Sequence[Item], stop: Sequence[Item], save: Callable[[Any], None]
    ) -> None:
        self._packet, self._train, self._stop, self.save = packet, train, stop, save
        self._without = packet.mean_loss(stop, untuned=True)

    @property
    def examples(self) -> int:
        return len(self._train)

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        return self._packet.lora.trained

    def loss(self, example: int) -> tuple[Tensor, int]:
        self._packet.lora.model.train()
        return self._packet.loss(self._train[example])

    def held_out(self) -> Mapping[str, float]:
        return {"KL": self._packet.mean_loss(self._stop), "KL without a packet": self._without}


def greedy(backbone: Backbone, text: str, length: int) -> Tensor:
    """The model's greedy answer ``[A]`` int64 to a prompt in a full prefill, of at most ``length`` tokens."""
    ids = backbone.tokenise_prompt(text).ids
    canvas = backbone.canvas(len(ids) + length)
    logits = backbone.forward(ids, torch.arange(len(ids)), canvas)
    assert logits is not None
    tokens = backbone.generate(ids, logits, backbone.on_canvas(canvas), max_new_tokens=length, do_sample=False)
    return torch.tensor(list(tokens))
