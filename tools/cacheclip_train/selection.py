"""CacheClip's auxiliary model, fitted to a primary: LoRA towards the primary's attention from the question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from cacheclip_eval.data import Item, prompt
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cacheclip_rag.chunks import MIN_CHARS, canonical
from cacheclip_rag.errors import PromptError
from cacheclip_rag.kv.encode import Isolated
from cacheclip_rag.methods import resolve
from cacheclip_rag.methods.scores import AttentionScores
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.prefill.reading import read
from cacheclip_rag.prefill.result import PrefillRequest
from cacheclip_rag.prompt import ChunkIndex
from cacheclip_rag.report import Report

from .lora import Lora
from .rows import Placed, Rows, composed

KEEPING = "cacheclip_keeping"
"""An attention implementation: transformers' sdpa, which hands out the queries and keys of the layers in ``kept``."""

_FLOOR = 1e-6
"""Added to every probability, so that a token without any attention does not make a divergence infinite."""


def _keeping(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    kept = options.pop("kept", None)
    if kept is not None and module.layer_idx in kept:
        kept[module.layer_idx] = query, key, options.get("scaling") or query.shape[-1] ** -0.5
    return sdpa_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register(KEEPING, _keeping)


class Teacher:
    """The primary model's attention from the question to the characters of passages, in a full prefill.

    It is the mean over heads, the question's tokens and the layers in ``band`` (relative depths), of a softmax over
    all that the question sees.
    """

    def __init__(self, backbone: Backbone, band: tuple[float, float] = (0.69, 0.83)) -> None:
        self.backbone = backbone
        low, high = (round(depth * backbone.layers) for depth in band)
        full = [layer for layer in backbone.full_layers if low <= layer < max(high, low + 1)]
        self.layers = full or backbone.full_layers[-1:]

    def masses(self, item: Item) -> dict[str, np.ndarray]:
        """For each passage that is a chunk: its text, and the attention ``[characters]`` float32 to each character.

        A token's attention is spread evenly over its characters. Raises `PromptError` beyond the context length.
        """
        backbone, text = self.backbone, prompt(item, self.backbone)
        index = ChunkIndex(backbone.quotes)
        for passage in item.passages:
            if len(canonical(passage.chunk)) >= MIN_CHARS:
                index.add(canonical(passage.chunk), canonical(passage.chunk))
        request = PrefillRequest(text, resolve("full"), 1.0, question=item.question)
        reading = read(backbone, index, request, Report("full", 1.0))
        starts, ends = reading.tokens.offsets.T
        asked = ((starts < reading.question.end) & (ends > reading.question.start)).nonzero()[:, 0]
        inside = [
            ((starts >= span.start) & (ends <= span.end) & (ends > starts)).nonzero()[:, 0] for span in reading.spans
        ]
        found = {span.key: np.zeros(len(span.key), dtype=np.float32) for span in reading.spans}
        if not len(asked) or not any(map(len, inside)):
            return {}
        columns = torch.cat(inside)
        hook = AttentionScores(
            asked.to(backbone.device), columns.to(backbone.device), self.layers, windows=backbone.computer.windows
        )
        rows = torch.arange(len(reading.tokens))
        depth = max(self.layers) + 1
        canvas = backbone.canvas(len(rows), depth)
        backbone.forward(reading.tokens.ids, rows, canvas, logits=0, depth=depth, hooks=[hook])
        scores = hook.scores.cpu().split([len(part) for part in inside])
        for span, part, mass in zip(reading.spans, inside, scores, strict=True):
            for row, one in zip(part.tolist(), mass.tolist(), strict=True):
                start, end = (int(offsets[row]) - span.start + span.offset for offsets in (starts, ends))
                found[span.key][start:end] += one / (end - start)
        return found


class Selection:
    """The `command.Trainee` of ``cacheclip tune auxiliary``.

    The auxiliary model scores tokens as `methods.auxiliary.Auxiliary` does: chunks encoded apart behind a shared
    prefix, then the question over all of them, mean over heads, question tokens and ``layers`` ("last" or "upper").
    The loss is ``KL(p || q)`` of its distribution over its own tokens from the teacher's, which is spread over
    characters, so that the tokenizers may differ. Source: CacheClip (arXiv 2510.10129), whose training is unpublished.
    """

    unit = "KL from the primary's attention over tokens (nats), and the share of its top fifth that is missed"

    def __init__(self, lora: Lora, teacher: Teacher, layers: str) -> None:
        self.lora, self._teacher = lora, teacher
        full = lora.backbone.full_layers
        self._layers = full[-1:] if layers == "last" else full[len(full) // 2 :]
        self._prefix = Isolated().prefix_ids(lora.backbone)
        self._targets: dict[str, dict[str, np.ndarray]] = {}

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

    def target(self, item: Item) -> dict[str, np.ndarray]:
        """The teacher's attention; computed once."""
        if item.id not in self._targets:
            self._targets[item.id] = self._teacher.masses(item)
        return self._targets[item.id]

    def compared(self, item: Item) -> tuple[Tensor, Tensor, int]:
        """The teacher's and the auxiliary model's distributions over its tokens, ``[C]``, and how many rows it took."""
        target = self.target(item)
        rows, columns, offsets = self.rows(list(target), item.question)
        lengths = [len(self.lora.backbone.tokenise(text, plain=True)) for text in target]
        parts = zip(target.values(), offsets.split(lengths), strict=True)
        p = torch.cat([_over(mass, spans) for mass, spans in parts])
        return _distribution(p), _distribution(self.scores(rows, columns).cpu()), len(rows)

    def fits(self, item: Item) -> bool:
        texts = [canonical(passage.chunk) for passage in item.passages]
        try:
            texts = [text for text in texts if len(text) >= MIN_CHARS]
            return bool(texts) and bool(item.question.strip()) and len(self.rows(texts, item.question)[0]) > 0
        except PromptError:
            return False

    def task(self, train: Sequence[Item], stop: Sequence[Item], save: Callable[[Any], None]) -> _Task:
        return _Task(self, train, stop, save)

    def report(self, items: Sequence[Item]) -> dict[str, float]:
        found = {}
        for untuned in (True, False):
            for name, value in self.mean(items, untuned).items():
                found[f"{'untuned' if untuned else 'tuned'}, {name}"] = value
        return found

    def mean(self, items: Sequence[Item], untuned: bool = False) -> dict[str, float]:
        """The mean divergence, and the mean share of the teacher's top fifth that is not in the auxiliary model's."""
        sums = Counter[str]()
        with self.lora.looking(untuned):
            for item in items:
                p, q, _ = self.compared(item)
                count = max(1, len(p) // 5)
                both = set(p.topk(count).indices.tolist()) & set(q.topk(count).indices.tolist())
                sums.update({"KL": float(kl(p, q)), "top fifth missed": 1 - len(both) / count})
        return {name: value / len(items) for name, value in sums.items()}


class _Task:
    def __init__(
        self, selection: Selection, train: Sequence[Item], stop: Sequence[Item], save: Callable[[Any], None]
    ) -> None:
        self._selection, self._train, self._stop, self.save = selection, train, stop, save

    @property
    def examples(self) -> int:
        return len(self._train)

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        return self._selection.lora.trained

    def loss(self, example: int) -> tuple[Tensor, int]:
        self._selection.lora.model.train()
        p, q, tokens = self._selection.compared(self._train[example])
        return kl(p, q), tokens

    def held_out(self) -> Mapping[str, float]:
        return self._selection.mean(self._stop)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """``KL(p || q)`` in nats."""
    return (p * (p / q).log()).sum()


def _over(mass: np.ndarray, spans: Tensor) -> Tensor:
    """A character distribution's mass on each token, ``[n]``; ``spans [n, 2]``. Tokens that share a character share its
    mass.
    """
    shares = np.zeros(len(mass) + 1, dtype=np.float32)
    for start, end in spans.tolist():
        shares[start:end] += 1
    each = np.concatenate([[0.0], np.cumsum(mass / np.maximum(shares[:-1], 1))])
    return torch.from_numpy(each[spans[:, 1].numpy()] - each[spans[:, 0].numpy()]).float()


def _distribution(scores: Tensor) -> Tensor:
    scores = scores / scores.sum().clamp_min(1e-12) + _FLOOR
    return scores / scores.sum()
