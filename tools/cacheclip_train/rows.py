"""One prompt with its answer as reuse of stored KV computes it, written as one forward with a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cacheclip_rag.chunks import MIN_CHARS, canonical
from cacheclip_rag.errors import PromptError
from cacheclip_rag.methods import Method
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.prefill.compose import shared_positions
from cacheclip_rag.prefill.reading import read
from cacheclip_rag.prefill.result import PrefillRequest
from cacheclip_rag.prompt import NO_SOFT_TOKENS, ChunkIndex, SoftTokens
from cacheclip_rag.report import Report


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one forward: ``ids [R]`` int64, RoPE ``positions [R]`` int64, and ``mask [R, R]`` bool, true where a
    row may attend; None for the causal mask. The last ``answer`` rows are the answer's tokens. Negative ids are soft
    tokens.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    answer: int

    def __len__(self) -> int:
        return len(self.ids)


def full_rows(backbone: Backbone, prompt: str, answer: Tensor) -> Rows:
    """The rows of a full prefill. ``answer [A]`` int64. Raises `PromptError` beyond the context length."""
    ids = torch.cat([backbone.tokenise_prompt(prompt).ids, answer])
    _check(backbone, len(ids))
    return Rows(ids, torch.arange(len(ids)), None, len(answer))


def rows_of(
    backbone: Backbone,
    method: Method,
    prompt: str,
    passages: Sequence[str],
    answer: Tensor,
    soft: SoftTokens = NO_SOFT_TOKENS,
) -> Rows:
    """The rows of ``method`` at ratio 0, with ``passages`` encoded ahead as chunks, and ``soft`` tokens around them;
    ``answer [A]`` int64.

    A chunk is there as a whole, behind a copy of the encode prefix, at the positions it is placed at, and sees no
    more than that. RoPE is relative, so its KV is what it would be anywhere else, moved. All other tokens of the prompt
    and the answer see every token of the prompt before them, as far as chunks go the ones that stored KV is used of:
    a token of a chunk that the prompt tokenises differently is seen by its own chunk only. Prompt and chunks are read
    and aligned by the engine's own code. Raises `PromptError` beyond the context length.
    """
    index = ChunkIndex(backbone.quotes)
    for text in passages:
        if len(canonical(text)) >= MIN_CHARS:
            index.add(canonical(text), canonical(text))
    reading = read(backbone, index, PrefillRequest(prompt, method, 0.0), Report(method.name, 0.0))
    tokens = [soft.wrapped(backbone.tokenise(span.key, plain=True)) for span in reading.spans]
    layout = soft.around(reading.layout(list(zip(reading.spans, tokens, strict=True))), tokens)
    count = len(layout)
    _check(backbone, count + len(answer))
    places = shared_positions(layout) if method.positions == "shared" else torch.arange(count)

    # By span and by the distance it is moved: one, unless the prompt tokenises the chunk's middle in another way.
    moved: dict[tuple[int, int], list[tuple[int, slice]]] = {}
    for number, row, part in layout.runs():
        moved.setdefault((number, int(places[row]) - part.start), []).append((row, part))
    chunks = []
    for (number, start), runs in moved.items():
        slots = torch.full((len(tokens[number]),), -1)
        for row, part in runs:
            slots[part] = torch.arange(row, row + part.stop - part.start)
        slots[slots == count - 1] = -1  # the last token is always computed
        chunks.append(Placed(tokens[number].ids, start, slots))
    held = layout.reusable.clone()
    held[-1] = False
    fresh = (~held).nonzero()[:, 0]
    behind = torch.arange(len(answer))
    return composed(
        method.encode.prefix_ids(backbone),
        chunks,
        torch.cat([layout.ids[fresh], answer]),
        torch.cat([fresh, count + behind]),
        torch.cat([places[fresh], int(places.max()) + 1 + behind]),
        len(answer),
    )


@dataclass(frozen=True, eq=False)
class Placed:
    """A chunk in a prompt: its tokens ``ids [n]`` int64, the RoPE position ``start`` that the first is moved to, and
    the ``slots [n]`` int64 of the prompt that they hold, -1 for a token that the prompt does not have.
    """

    ids: Tensor
    start: int
    slots: Tensor


def composed(
    prefix: Tensor, chunks: Sequence[Placed], ids: Tensor, slots: Tensor, positions: Tensor, answer: int
) -> Rows:
    """The rows of a prompt that is composed of ``chunks``, each behind a copy of the encode ``prefix [P]``, and of
    computed tokens, ``ids [n]`` at prompt ``slots [n]`` and RoPE ``positions [n]``, of which the last ``answer`` are
    the answer. Chunks come first, in their order.
    """
    before = torch.full((len(prefix),), -1)
    each = [torch.cat([prefix, chunk.ids]) for chunk in chunks]
    places = [torch.arange(chunk.start - len(prefix), chunk.start + len(chunk.ids)) for chunk in chunks]
    copies = [torch.full((len(one),), number) for number, one in enumerate(each)]
    held = [part for chunk in chunks for part in (before, chunk.slots)]
    mask = _mask(torch.cat([*held, slots]), torch.cat([*copies, torch.full((len(ids),), -1)]))
    return Rows(torch.cat([*each, ids]), torch.cat([*places, positions]), mask, answer)


def _mask(slots: Tensor, copies: Tensor) -> Tensor:
    """``slots [R]``: a row's place in the prompt, -1 without one; ``copies [R]``: its chunk, -1 for a computed row."""
    order = torch.arange(len(slots))
    inside = (copies[:, None] == copies) & (order <= order[:, None])
    before = (slots >= 0) & (slots <= slots[:, None])
    return torch.where(copies[:, None] >= 0, inside, before)


def _check(backbone: Backbone, length: int) -> None:
    if length > backbone.context_length:
        raise PromptError(f"{length:,} tokens exceed the model's context length of {backbone.context_length:,}")
