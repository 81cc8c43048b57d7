"""A head on a frozen auxiliary model, fitted to a primary: the cheaper rival of tuning the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cacheclip_eval.data import Item
from torch import Tensor, nn

from cacheclip_rag.errors import NotComposable
from cacheclip_rag.kv.encode import Isolated
from cacheclip_rag.kv.library import Library
from cacheclip_rag.methods.auxiliary import Auxiliary
from cacheclip_rag.methods.head import PLAIN, SelectionHead, read_head
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.store import MemoryStore

from . import fitting
from .fitting import Fitting, Targets
from .teacher import Teacher, chunks_of, distribution, over


class Head:
    """The `command.Trainee` of ``cacheclip tune head``.

    Features come from the engine's own `Auxiliary`, over chunks that are encoded and kept nowhere; each item's are
    computed once and held in float16. The loss is `fitting.Fitting`'s. Untuned it is the auxiliary model's last layer.
    """

    unit = fitting.UNIT

    def __init__(self, backbone: Backbone, teacher: Teacher, hidden: int, seed: int = 0) -> None:
        if backbone.obstacle is not None:
            raise NotComposable(f"{backbone.obstacle}: it cannot be an auxiliary model")
        self.library = Library(backbone, Isolated(), lambda namespace: MemoryStore(0))
        self.auxiliary, self.targets = Auxiliary(self.library), Targets(teacher)
        self._known: dict[str, tuple[Tensor, Tensor]] = {}
        self._untuned, self._hidden, self._seed = False, hidden, seed
        self._head: SelectionHead | None = None

    def features(self, item: Item) -> tuple[Tensor, Tensor]:
        """The features ``[C, F]`` float16 and the target ``[C]`` float32 of the tokens of an item's chunks."""
        if item.id not in self._known:
            target = self.targets.of(item)
            chunks = [self.library.encode(text) for text in target]
            mass = torch.cat([over(target[chunk.text], chunk.offsets) for chunk in chunks])
            found = self.auxiliary.features(chunks, self.auxiliary.asked(item.question))
            self._known[item.id] = found.half().clone(), mass
        return self._known[item.id]

    @property
    def head(self) -> SelectionHead:
        """Made when it is first asked for: its width follows from the model."""
        if self._head is None:
            model = self.library.backbone
            torch.manual_seed(self._seed)
            width = len(model.full_layers) + model.kv_heads * model.head_dim + PLAIN
            self._head = SelectionHead(width, self._hidden)
        return self._head

    def compared(self, item: Item) -> tuple[Tensor, Tensor, int]:
        features, mass = self.features(item)
        last = len(self.library.backbone.full_layers) - 1
        scores = features.float()[:, last] if self._untuned else self.head(features.float())
        return distribution(mass), distribution(scores.softmax(dim=0)), len(mass)

    def fits(self, item: Item) -> bool:
        texts = chunks_of(item)
        tokens = [len(self.library.backbone.tokenise(text, plain=True)) for text in texts]
        room = (
            self.library.backbone.context_length
            - len(self.library.prefix_ids)
            - len(self.auxiliary.asked(item.question))
        )
        return bool(texts) and sum(tokens) <= room and self.targets.has(item)

    def task(self, train: Sequence[Item], stop: Sequence[Item], save: Callable[[Any], None]) -> Fitting:
        return Fitting(self, train, stop, save)

    def report(self, items: Sequence[Item]) -> dict[str, float]:
        return fitting.report(self, items)

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        return dict(self.head.named_parameters())

    def training(self) -> None:
        self.head.train()

    @contextmanager
    def looking(self, untuned: bool = False) -> Iterator[None]:
        self._untuned = untuned
        try:
            with torch.no_grad():
                yield
        finally:
            self._untuned = False

    def save(self, folder: Path) -> None:
        self.head.save(folder)

    def load(self, folder: Path) -> None:
        head = read_head(folder)
        assert head is not None
        self.head.load_state_dict(head.state_dict())
