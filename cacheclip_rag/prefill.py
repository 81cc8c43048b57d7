"""From a prompt to its KV on a canvas: wholly computed, or put together from stored chunks and repaired."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from .auxiliary import Auxiliary, CharacterScores
from .backbone import Backbone, Tokens
from .canvas import Canvas
from .chunks import ChunkKV
from .errors import ConfigurationError, PromptError
from .library import Library
from .methods import Method
from .prefixes import PrefixCache
from .prompt import ChunkIndex, Layout, Span, align, find_question
from .report import ChunkUse, Report
from .select import Request


@dataclass(frozen=True, eq=False)
class Prefill:
    """A prompt whose KV stands on a canvas: ``logits [1, V]`` of its last token, and everything to go on from there.

    ``canvas`` is None for a model served by plain prefill. ``step`` is what `Backbone.generate` decodes with.
    """

    layout: Layout
    canvas: Canvas | None
    logits: Tensor
    report: Report
    step: Callable[[Tensor, int], Tensor]


def native(backbone: Backbone, prompt: str, report: Report) -> Prefill:
    """Full prefill with transformers' own attention and cache."""
    tokens = _fitting(backbone, backbone.tokenise_prompt(prompt))
    logits, step = backbone.native_prefill(tokens.ids)
    report.prompt_tokens = report.fresh = len(tokens)
    return Prefill(align(prompt, tokens.ids, tokens.offsets, [], []), None, logits, report, step)


def full(backbone: Backbone, index: ChunkIndex, prompt: str, room: int, report: Report) -> Prefill:
    """Full prefill on a canvas. Chunks are still recognised: control tokens inside documents stay text."""
    with report.timed("tokenise"):
        documents = [(span.start, span.end) for span in index.find(prompt)]
        tokens = _fitting(backbone, backbone.tokenise_prompt(prompt, documents))
    canvas = backbone.canvas(len(tokens) + room)
    with report.timed("recompute"):
        logits = backbone.forward(tokens.ids, torch.arange(len(tokens)), canvas)
    assert logits is not None
    report.prompt_tokens = report.fresh = len(tokens)
    report.canvas_bytes = canvas.nbytes
    layout = align(prompt, tokens.ids, tokens.offsets, [], [])
    return Prefill(layout, canvas, logits, report, backbone.on_canvas(canvas))


class Reuse:
    """Prefill from stored chunks. Not for two threads at once; the engine's turns see to that."""

    def __init__(self, library: Library, index: ChunkIndex) -> None:
        self._library, self._index = library, index
        self._backbone = library.backbone
        self._rotary = library.backbone.rotary
        self._prefixes = PrefixCache()
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cacheclip-auxiliary")

    def __call__(
        self,
        prompt: str,
        method: Method,
        ratio: float,
        room: int,
        report: Report,
        *,
        auxiliary: Auxiliary | None = None,
        question: str | None = None,
        hints: Collection[str] = (),
    ) -> Prefill:
        """Recognise, tokenise, load, place, select, recompute.

        At most ``ratio`` of the placed tokens are recomputed, next to everything that has no stored KV. ``question``
        and ``hints`` (keys) are advice. Whatever this raises, apart from `PromptError`, the caller answers by full
        prefill.
        """
        backbone = self._backbone
        with report.timed("recognise"):
            spans = self._index.find(prompt, hints)
            asked = find_question(prompt, spans, question, backbone.control_tokens, backbone.closing)
        scores = self._auxiliary_scores(auxiliary, method, ratio, spans, asked.text)
        with report.timed("tokenise"):
            tokens = _fitting(backbone, backbone.tokenise_prompt(prompt, [(s.start, s.end) for s in spans]))
        with report.timed("load"):
            chunks, missing = self._load(span.key for span in spans)
        with report.timed("tokenise"):
            stored = [(chunks[s.key].ids, chunks[s.key].offsets) if s.key in chunks else None for s in spans]
            layout = align(prompt, tokens.ids, tokens.offsets, spans, stored)

        count = len(layout)
        canvas = backbone.canvas(count + max(room, 64))
        with report.timed("place"):
            prefix = self._place_prefix(layout, canvas)
            for number, row, part in layout.runs():
                canvas.place(chunks[spans[number].key], part, row, self._rotary)
            exact = self._exact_rows(layout)

        held = layout.reusable.clone()
        held[count - 1] = False  # the last token's logits are wanted, so it is always computed
        rows = (held & ~exact).nonzero()[:, 0]
        fresh = (~held).nonzero()[:, 0]
        fresh = fresh[fresh >= prefix]
        chosen = rows[:0]
        if budget := int(ratio * len(rows) + 1e-9):
            with report.timed("select"):
                request = Request(
                    layout=layout,
                    canvas=canvas,
                    backbone=backbone,
                    auxiliary=scores,
                    rows=rows,
                    groups=layout.chunk[rows],
                    fresh=fresh,
                    question=asked.text,
                    question_rows=asked.rows(layout),
                )
                chosen = method.select.select(request, budget)
        with report.timed("recompute"):
            compute = torch.cat([fresh, chosen]).sort().values
            logits = backbone.forward(layout.ids[compute], compute, canvas)
        assert logits is not None
        self._prefixes.keep(layout.ids, _first(layout.reusable, 0), canvas)

        report.prompt_tokens, report.prefix = count, prefix
        report.recomputed, report.fresh = len(chosen), len(fresh)
        report.reused = count - prefix - len(chosen) - len(fresh)
        report.edges = int(layout.edge.sum())
        report.canvas_bytes = canvas.nbytes
        report.chunks = [self._use(layout, n, chosen, held, exact, missing) for n in range(len(spans))]
        report.fallbacks += [f"chunk {key[:12]} prefilled: {reason}" for key, reason in missing.items()]
        return Prefill(layout, canvas, logits, report, backbone.on_canvas(canvas))

    def _load(self, keys: Iterable[str]) -> tuple[dict[str, ChunkKV], dict[str, str]]:
        """The chunks that are there, and for the others the reason why not."""
        chunks: dict[str, ChunkKV] = {}
        missing: dict[str, str] = {}
        for key in dict.fromkeys(keys):
            chunk = self._library.get(key)
            if chunk is None:
                missing[key] = "its stored KV is gone or damaged"
            else:
                chunks[key] = chunk
        return chunks, missing

    def _place_prefix(self, layout: Layout, canvas: Canvas) -> int:
        """Put the KV of the prompt's head on the canvas, where an earlier request left it; the number of its rows."""
        kept = self._prefixes.longest(layout.ids)
        if kept is None:
            return 0
        length = min(kept[0].shape[2], _first(layout.reusable, len(layout)), len(layout) - 1)
        if length:
            canvas.write(0, kept[0][:, :, :length], kept[1][:, :, :length])
        return length

    def _exact_rows(self, layout: Layout) -> Tensor:
        """``[T]`` bool: chunk tokens that follow the very prefix they were encoded behind; their KV is right."""
        exact = torch.zeros(len(layout), dtype=torch.bool)
        prefix = self._library.prefix_ids
        for _, row, part in layout.runs()[:1]:
            if part.start == 0 and row == len(prefix) and torch.equal(layout.ids[:row], prefix):
                exact[row : row + part.stop] = True
        return exact

    def _auxiliary_scores(
        self, auxiliary: Auxiliary | None, method: Method, ratio: float, spans: Sequence[Span], question: str
    ) -> Callable[[str], list[CharacterScores]]:
        """The auxiliary model's scores on demand; on a device of its own it starts now, while KV is loaded."""

        def score(layers: str) -> list[CharacterScores]:
            if auxiliary is None:
                raise ConfigurationError(f'method "{method.name}" needs an auxiliary model')
            return auxiliary.score([self._index.text(span.key) or "" for span in spans], question, layers)

        apart = auxiliary is not None and auxiliary.backbone.device != self._backbone.device
        if not (apart and method.select.needs_auxiliary and ratio and spans):
            return score
        future = self._threads.submit(score, getattr(method.select, "layers", "last"))
        return lambda layers: future.result()

    def _use(
        self, layout: Layout, number: int, chosen: Tensor, held: Tensor, exact: Tensor, missing: dict[str, str]
    ) -> ChunkUse:
        span, mine = layout.spans[number], layout.chunk == number
        inside = (layout.offsets[:, 0] >= span.start) & (layout.offsets[:, 0] < span.end)
        recomputed, placed = int(mine[chosen].sum()), int((held & mine).sum())
        return ChunkUse(
            key=span.key,
            start=span.start,
            end=span.end,
            reused=placed - recomputed,
            recomputed=recomputed,
            computed=int(inside.sum()) - placed,
            whole=len(span) == len(self._index.text(span.key) or ""),
            exact=bool((exact & mine).any()),
            missing=missing.get(span.key),
        )


def _fitting(backbone: Backbone, tokens: Tokens) -> Tokens:
    if not len(tokens):
        raise PromptError("the prompt is empty")
    if len(tokens) >= backbone.window:
        raise PromptError(
            f"the prompt has {len(tokens):,} tokens, the model's context window {backbone.window:,}: "
            "retrieve fewer or smaller chunks, or choose a model with a larger window"
        )
    return tokens


def _first(mask: Tensor, otherwise: int) -> int:
    """Index of the first true element."""
    return int(mask.int().argmax()) if bool(mask.any()) else otherwise
