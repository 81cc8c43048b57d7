"""Items, adapters and tasks for the tests of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cacheclip_eval.data import Item, Passage
from cacheclip_train.blocks import Blocks
from cacheclip_train.lora import Lora, Soft
from cacheclip_train.packet import Packet
from tiny import PASSAGES, QUESTION
from torch import Tensor, nn

from cacheclip_rag import Backbone
from cacheclip_rag.methods import resolve

ITEM = Item(
    "one", QUESTION, ("Marguerite Okafor",), tuple(Passage(f"Part {n}", text) for n, text in enumerate(PASSAGES))
)


def adapter(backbone: Backbone, folder: Path, seed: int = 3, method: str = "blockattention") -> Blocks:
    """An adapter of random weights, saved in ``folder`` without a card. It changes much of what the model says."""
    adapted = Blocks(Lora(backbone, rank=4), resolve(method), joint=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.lora.trained.values():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    adapted.lora.save(folder)
    return adapted


SOFT = {"kvlink": Soft("links", 0, 3), "kvpacket": Soft("packet", 4, 2)}


def soft_tokens(backbone: Backbone, folder: Path, method: str, rank: int = 4, seed: int = 3) -> Blocks | Packet:
    """Soft tokens, and weights of ``rank`` with link tokens, of random numbers, saved in ``folder`` without a card."""
    lora = Lora(backbone, rank if method == "kvlink" else 0, soft=SOFT[method])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora.trained.items():
            wide = 0.3 if "vectors" in name else 0.15
            parameter.copy_(wide * torch.randn(parameter.shape, generator=generator))
    lora.save(folder)
    return Blocks(lora, resolve("kvlink"), joint=False) if method == "kvlink" else Packet(lora, resolve("kvpacket"), 8)


class Line:
    """A `Task`: be near ten points around 0.3. ``fail``: the loss is NaN behind so many examples; ``stop``: Ctrl-C."""

    examples = 10

    def __init__(self, fail: int | None = None, stop: int | None = None, flat: bool = False) -> None:
        self.weight = nn.Parameter(torch.zeros(2))
        self.seen, self.saved = 0, list[Sequence[Mapping[str, Any]]]()
        self._fail, self._stop, self._flat = fail, stop, flat

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight}

    def loss(self, example: int) -> tuple[Tensor, int]:
        self.seen += 1
        if self.seen == self._stop:
            raise KeyboardInterrupt
        wrong = float("nan") if self._fail is not None and self.seen > self._fail else 0.0
        point = 0.3 + torch.cos(example * torch.tensor([1.0, 2.0]))
        return (self.weight - point).square().mean() + wrong, 7

    def held_out(self) -> dict[str, float]:
        return {"loss": 1.0 if self._flat else float((self.weight - 0.3).detach().square().mean())}

    def save(self, history: Sequence[Mapping[str, Any]]) -> None:
        self.saved.append(list(history))
