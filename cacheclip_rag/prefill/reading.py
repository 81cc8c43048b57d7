"""Reading a prompt: recognises its documents, finds its question, tokenises it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..errors import PromptError
from ..model.backbone import Backbone
from ..prompt import ChunkIndex, Layout, Question, Span, Stretch, Tokens, align, recognise, unquoted
from ..report import Report
from .loading import Loads
from .result import PrefillRequest

_SLACK = 256
"""Tokens by which a prompt may be shorter once control tokens inside its documents are plain text."""


@dataclass(frozen=True, eq=False)
class Reading:
    """A prompt with its documents, question and tokens.

    ``spans``: the known chunks, and parts of them, in ``prompt``; ``tokens``: as transformers tokenises the prompt,
    except that control tokens inside documents are plain text. ``loads``: its chunks, if they are being loaded already;
    ``failed``: reading it failed at the first attempt.
    """

    prompt: str
    spans: tuple[Span, ...]
    question: Question
    tokens: Tokens
    text: tuple[Stretch, ...] = ()
    loads: Loads | None = None
    failed: bool = False

    def layout(self, chunks: Sequence[tuple[Span, Tokens | None]] = ()) -> Layout:
        """The tokens, and which of them can take their KV from ``chunks`` (a chunk's tokens; None if it has no KV)."""
        stored = [None if tokens is None else (tokens.ids, tokens.offsets) for _, tokens in chunks]
        return align(self.prompt, self.tokens.ids, self.tokens.offsets, [span for span, _ in chunks], stored)

    @property
    def borders(self) -> list[int]:
        """The rows at which documents begin, and where the last one ends, sorted."""
        return borders_of(self.tokens, self.spans)


def read(
    backbone: Backbone,
    index: ChunkIndex,
    request: PrefillRequest,
    report: Report,
    load: Callable[[Sequence[Span], Tokens], Loads | None] = lambda spans, tokens: None,
) -> Reading:
    """Recognise the documents of a request's prompt, find its question, and tokenise it.

    ``load`` begins to load the documents as soon as they are known. It needs no lock. Raises `PromptError` for a prompt
    without tokens, and for one beyond the model's context length.
    """
    prompt, hints, caller = request.prompt, request.hints, request.caller
    with report.timed("tokenise"):
        raw = backbone.tokenise(prompt)
    check_fits(raw, backbone.context_length + _SLACK)  # before any work on a prompt that is far too long
    with report.timed("recognise"):
        found = recognise(prompt, index, backbone, () if hints is None else hints.keys(caller))
        known = request.question or _announced(prompt, found.spans, index, request)
        found = dataclasses.replace(found, spans=unquoted(prompt, found.spans, known, index.whole))
        loads = load(found.spans, raw)
        question = found.question(known)
    with report.timed("tokenise"):
        tokens = backbone.tokenise_prompt(prompt, found.text, raw)
    check_fits(tokens, backbone.context_length)
    report.prompt_tokens = len(tokens)
    return Reading(prompt, tuple(found.spans), question, tokens, tuple(found.text), loads)


def _announced(prompt: str, spans: Sequence[Span], index: ChunkIndex, request: PrefillRequest) -> str | None:
    """The question announced with the prompt's chunks; also where it quotes one of them, which a part of a chunk in it
    tells.
    """
    hints, caller = request.hints, request.caller
    if hints is None:
        return None
    whole = [span for span in spans if index.whole(span)]
    return hints.question(prompt, spans, caller) or hints.question(prompt, whole, caller)


def borders_of(tokens: Tokens, spans: Sequence[Span]) -> list[int]:
    """The rows at which these documents begin, and where the last one ends, sorted."""
    firsts = tokens.offsets[:, 0].contiguous()
    characters = torch.tensor([*(span.start for span in spans), *(span.end for span in spans[-1:])], dtype=torch.long)
    return sorted(set(torch.searchsorted(firsts, characters).tolist()))


def check_fits(tokens: Tokens, context_length: int) -> None:
    """Raises `PromptError` if there are no tokens, or no room for an answer within the context length."""
    if not len(tokens):
        raise PromptError("the prompt is empty")
    if len(tokens) >= context_length:
        raise PromptError(
            f"the prompt has {len(tokens):,} tokens, the model's context length is {context_length:,}: "
            "retrieve fewer or smaller chunks, or choose a model with a longer one"
        )


def workspace_size(backbone: Backbone, count: int, room: int) -> int:
    """The slots (tokens) for a prompt of ``count`` tokens and ``room`` more, at most the context length, so that a very
    large ``room`` allocates no memory that no answer can fill.
    """
    return min(count + room, max(backbone.context_length, count))
