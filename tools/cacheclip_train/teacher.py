"""What an auxiliary model is fitted to: the primary's attention from the question, by character."""

from __future__ import annotations

import numpy as np
import torch
from cacheclip_eval.data import Item, prompt
from torch import Tensor

from cacheclip_rag.chunks import MIN_CHARS, canonical
from cacheclip_rag.methods import resolve
from cacheclip_rag.methods.scores import AttentionScores
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.prefill.reading import Reading, read
from cacheclip_rag.prefill.result import PrefillRequest
from cacheclip_rag.prompt import ChunkIndex
from cacheclip_rag.report import Report

_FLOOR = 1e-6
"""Added to every probability, so that a token without any attention does not make a divergence infinite."""


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

    def sees(self, item: Item) -> bool:
        """Whether the item's prompt has a question and passages that are chunks. Raises `PromptError` beyond the
        context length.
        """
        _, asked, inside = self._read(item)
        return bool(len(asked)) and any(map(len, inside))

    def _read(self, item: Item) -> tuple[Reading, Tensor, list[Tensor]]:
        """An item's prompt, the rows of its question, and those of each chunk."""
        index = ChunkIndex(self.backbone.quotes)
        for chunk in chunks_of(item):
            index.add(chunk, chunk)
        request = PrefillRequest(prompt(item, self.backbone), resolve("full"), 1.0, question=item.question)
        reading = read(self.backbone, index, request, Report("full", 1.0))
        starts, ends = reading.tokens.offsets.T
        asked = ((starts < reading.question.end) & (ends > reading.question.start)).nonzero()[:, 0]
        inside = [
            ((starts >= span.start) & (ends <= span.end) & (ends > starts)).nonzero()[:, 0] for span in reading.spans
        ]
        return reading, asked, inside

    def masses(self, item: Item) -> dict[str, np.ndarray]:
        """For each passage that is a chunk: its text, and the attention ``[characters]`` float32 to each character.

        A token's attention is spread evenly over its characters. For an item that the teacher `sees`. Raises
        `PromptError` beyond the context length.
        """
        backbone = self.backbone
        reading, asked, inside = self._read(item)
        found = {span.key: np.zeros(len(span.key), dtype=np.float32) for span in reading.spans}
        starts, ends = reading.tokens.offsets.T
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


def chunks_of(item: Item) -> list[str]:
    """The item's passages that are long enough to be chunks."""
    texts = [canonical(passage.chunk) for passage in item.passages]
    return [text for text in texts if len(text) >= MIN_CHARS]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """``KL(p || q)`` in nats."""
    return (p * (p / q).log()).sum()


def over(mass: np.ndarray, spans: Tensor) -> Tensor:
    """A character distribution's mass on each token, ``[n]``; ``spans [n, 2]``. Tokens that share a character share its
    mass.
    """
    shares = np.zeros(len(mass) + 1, dtype=np.float32)
    for start, end in spans.tolist():
        shares[start:end] += 1
    each = np.concatenate([[0.0], np.cumsum(mass / np.maximum(shares[:-1], 1))])
    return torch.from_numpy(each[spans[:, 1].numpy()] - each[spans[:, 0].numpy()]).float()


def distribution(scores: Tensor) -> Tensor:
    """``scores [n]`` as probabilities, none of them 0."""
    scores = scores / scores.sum().clamp_min(1e-12) + _FLOOR
    return scores / scores.sum()
