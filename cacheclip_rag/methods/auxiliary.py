"""CacheClip's auxiliary model: scores the characters of chunks by a small model's attention from the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..chunks import ChunkKV
from ..compute import Computer, Part
from ..errors import PromptError
from .head import SelectionHead, features
from .scores import AttentionScores

if TYPE_CHECKING:
    from ..kv.library import Library


@dataclass(frozen=True, eq=False)
class CharacterScores:
    """Scores of one chunk: ``scores [n]`` float32 of the auxiliary tokens with character spans ``offsets [n, 2]``."""

    text: str
    offsets: np.ndarray
    scores: np.ndarray

    def over(self, offsets: np.ndarray) -> np.ndarray:
        """The scores of another tokenizer's tokens, with spans ``offsets [m, 2]`` in the same text: ``[m]`` float32.

        A token takes the highest score of the auxiliary tokens it shares a character with, so that every character the
        auxiliary model picked is covered, whatever the two tokenizations are.
        """
        characters = np.zeros(len(self.text) + 1, dtype=np.float32)
        for (start, end), score in zip(self.offsets, self.scores, strict=True):
            span = characters[start:end]
            np.maximum(span, score, out=span)
        bounds = offsets.reshape(-1).clip(0, len(self.text))
        highest = np.maximum.reduceat(characters, bounds)[::2] if len(bounds) else np.zeros(0, dtype=np.float32)
        return np.where(offsets[:, 1] > offsets[:, 0], highest, 0.0).astype(np.float32)


class Auxiliary:
    """A small model that scores context tokens by the attention from the question to them.

    Its own chunk KV is stored like the primary model's, so scoring costs one forward over the question's tokens: the
    chunks are placed one after another behind the shared prefix, and the question runs over them in one pass, with one
    softmax over all chunks, on reused KV (docs/methods.md). Chunks beyond its context length are scored in several
    passes. With a ``head``, trained by ``cacheclip tune head``, scores are its own, from the attention of all layers
    and other features. Source: CacheClip (arXiv 2510.10129), section on auxiliary-model-guided selection.
    """

    def __init__(self, library: Library, head: SelectionHead | None = None) -> None:
        self.library, self.backbone, self.head = library, library.backbone, head
        self.computer: Computer = library.backbone.computer

    def layers(self, which: str | int) -> list[int]:
        """The layers that scores are averaged over: ``"last"`` as published, ``"upper"`` half, or one by number."""
        full = self.computer.full_layers
        if isinstance(which, int):
            return [which]
        return full[-1:] if which == "last" else full[len(full) // 2 :]

    def score(self, texts: Sequence[str], question: str, layers: str | int = "last") -> list[CharacterScores]:
        """Attention from the question to every token of each chunk: mean over heads, question tokens and ``layers``.

        The softmax runs over everything the question sees. A question longer than half of the context length is cut to
        its end; chunks that do not fit beside it score 0. A head takes all layers.
        """
        asked = self.asked(question)
        room = self.backbone.context_length - len(self.library.prefix_ids) - len(asked)
        chunks: dict[int, ChunkKV] = {}
        for number, text in enumerate(texts):
            try:
                chunk = self.library.ensure(text)
            except PromptError:
                continue
            if len(chunk) <= room:
                chunks[number] = chunk
        results = [CharacterScores(text, np.zeros((0, 2), np.int64), np.zeros(0, np.float32)) for text in texts]
        batch: list[int] = []
        size = 0
        for number in [*chunks, -1]:
            if number < 0 or size + len(chunks[number]) > room:
                for n, scores in zip(batch, self._pass([chunks[n] for n in batch], asked, layers), strict=True):
                    results[n] = CharacterScores(chunks[n].text, chunks[n].offsets.numpy(), scores)
                batch, size = [], 0
            if number >= 0:
                batch.append(number)
                size += len(chunks[number])
        return results

    def asked(self, question: str) -> torch.Tensor:
        """The question's tokens ``[q]`` as they are run over the chunks."""
        length = self.backbone.context_length - len(self.library.prefix_ids)
        return self.backbone.tokenise("\n\n" + question, plain=True).ids[-max(length // 2, 1) :]

    def _pass(self, chunks: Sequence[ChunkKV], question: torch.Tensor, layers: str | int) -> list[np.ndarray]:
        if not chunks:
            return []
        if self.head is None:
            [scores], _ = self._attention(chunks, question, [self.layers(layers)])
        else:
            scores = self.head(self.features(chunks, question)).softmax(dim=0)
        return [part.numpy() for part in scores.cpu().split([len(chunk) for chunk in chunks])]

    def features(self, chunks: Sequence[ChunkKV], question: torch.Tensor) -> torch.Tensor:
        """What a head knows of each token of ``chunks``: ``[C, F]`` float32 (see `head.features`)."""
        attention, values = self._attention(chunks, question, [[layer] for layer in self.computer.full_layers])
        ids, sizes = torch.cat([chunk.ids for chunk in chunks]), [len(chunk) for chunk in chunks]
        return features(torch.stack(attention), values.flatten(1), ids, sizes, question)

    def _attention(
        self, chunks: Sequence[ChunkKV], question: torch.Tensor, layers: Sequence[Sequence[int]]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """For each group of ``layers``, the question's attention ``[C]`` to the tokens of chunks; and their values
        ``[C, Hk, D]`` at the last layer.
        """
        start = len(self.library.prefix_ids)
        lengths = [len(chunk) for chunk in chunks]
        stop = start + sum(lengths)
        workspace = self.computer.workspace(stop + len(question))
        if self.library.prefix_kv is not None:
            workspace.write(0, *self.library.prefix_kv)
        row = start
        for chunk in chunks:
            workspace.place(chunk, slice(0, len(chunk)), row)
            row += len(chunk)
        device = self.computer.device
        rows = torch.arange(stop, stop + len(question), device=device)
        columns = torch.arange(start, stop, device=device)
        hooks = [AttentionScores(rows, columns, group, windows=self.computer.windows) for group in layers]
        self.computer.forward([Part(workspace, question, rows, hooks=hooks)], logits=0)
        return [hook.scores for hook in hooks], workspace.placed(self.computer.layers - 1)[1][start:stop]
