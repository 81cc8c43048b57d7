"""From a prompt to its KV on a canvas: wholly computed, or put together from stored chunks and repaired."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..chunks import ChunkKV, canonical
from ..errors import ConfigurationError, PromptError
from ..kv.fit import context_fit
from ..kv.library import Library
from ..kv.preamble import PreambleCache
from ..kv.prefix_caching import PrefixCache
from ..kv.variants import FusedVariants
from ..methods import Method
from ..methods.auxiliary import Auxiliary, CharacterScores
from ..methods.request import Request
from ..methods.select.query_guided import question_scores
from ..model.backbone import Backbone
from ..model.canvas import Canvas
from ..model.tokenizer import Tokens
from ..prompt import ChunkIndex, Layout, Span, align, documents, find_question
from ..report import ChunkUse, Report, TokenSource, TokenSources

_GONE = "its stored KV is gone or damaged"
_OTHERWISE = 'not encoded as {name} wants it; engine.ensure(texts, method="{name}") does so ahead'
"""Of a chunk that the engine knows as another method encodes it: in the index it goes by its name there."""

_COPY = 64
"""Slots behind a prompt for a copy of its question, where it must be asked behind the last chunk (tokens)."""


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

    def forced(self, answer: Sequence[int]) -> Tensor:
        """Logits ``[n, V]`` of the n answer tokens' positions, the answer given.

        By the method's own decoding step, since some methods shape attention while decoding, too; all tokens at once,
        which costs little more than one.
        """
        if len(answer) < 2:
            return self.logits
        return torch.cat([self.logits, self.step(torch.tensor(answer[:-1]), len(self.layout))])


def recognise(backbone: Backbone, index: ChunkIndex, prompt: str, hints: Collection[str] = ()) -> list[Span]:
    """The documents in a prompt: known chunks and parts of them, the chat template's own text left out."""
    spans = index.find(prompt, hints)
    return documents(prompt, spans, index.whole, backbone.control_tokens, backbone.opening, backbone.closing)


def native(backbone: Backbone, index: ChunkIndex, prompt: str, report: Report) -> Prefill:
    """Full prefill with transformers' own attention and cache. Of the chunks only their control tokens matter."""
    quoted = [(span.start, span.end) for span in recognise(backbone, index, prompt)]
    tokens = fitting(backbone, backbone.tokenise_prompt(prompt, quoted))
    logits, step = backbone.native_prefill(tokens.ids)
    report.prompt_tokens = report.fresh = len(tokens)
    layout = align(prompt, tokens.ids, tokens.offsets, [], [])
    report.token_sources = token_sources(layout)
    return Prefill(layout, None, logits, report, step)


def full(backbone: Backbone, index: ChunkIndex, prompt: str, room: int, report: Report) -> Prefill:
    """Full prefill on a canvas. Chunks are still recognised: control tokens inside documents stay text."""
    with report.timed("tokenise"):
        quoted = [(span.start, span.end) for span in recognise(backbone, index, prompt)]
        tokens = fitting(backbone, backbone.tokenise_prompt(prompt, quoted))
    canvas = backbone.canvas(slots(backbone, len(tokens), room))
    with report.timed("recompute"):
        logits = backbone.forward(tokens.ids, torch.arange(len(tokens)), canvas)
    assert logits is not None
    report.prompt_tokens = report.fresh = len(tokens)
    report.canvas_bytes = canvas.nbytes
    layout = align(prompt, tokens.ids, tokens.offsets, [], [])
    report.token_sources = token_sources(layout)
    return Prefill(layout, canvas, logits, report, backbone.on_canvas(canvas))


def exact(backbone: Backbone, index: ChunkIndex, cache: PrefixCache, prompt: str, room: int, report: Report) -> Prefill:
    """Full prefill behind the longest beginning that an earlier prompt left in ``cache``: the same KV."""
    with report.timed("recognise"):
        spans = recognise(backbone, index, prompt)
    with report.timed("tokenise"):
        tokens = fitting(backbone, backbone.tokenise_prompt(prompt, [(s.start, s.end) for s in spans]))
        layout = align(prompt, tokens.ids, tokens.offsets, spans, [None] * len(spans))
        borders = document_borders(tokens, spans)
    count, known = len(tokens), 0
    canvas = backbone.canvas(slots(backbone, count, room))
    with report.timed("place"):
        for keys, values in cache.longest(tokens.ids, borders):
            keys, values = keys[:, :, : count - 1 - known], values[:, :, : count - 1 - known]
            canvas.write(known, keys, values)
            known += keys.shape[2]
    with report.timed("recompute"):
        logits = backbone.forward(tokens.ids[known:], torch.arange(known, count), canvas)
    assert logits is not None
    with report.timed("keep"):
        cache.keep(tokens.ids, borders, canvas, report.seconds["recompute"] / (count - known))
    report.prompt_tokens, report.prefix, report.fresh = count, known, count - known
    report.canvas_bytes = canvas.nbytes
    report.token_sources = token_sources(layout, known)
    return Prefill(layout, canvas, logits, report, backbone.on_canvas(canvas))


def token_sources(
    layout: Layout, prefix: int = 0, recomputed: Tensor | None = None, exact: Tensor | None = None
) -> TokenSources:
    """What became of each token: the first ``prefix`` came from an earlier request.

    Where chunks were reused, ``recomputed [n]`` (rows) were refreshed, and those in ``exact [T]`` (bool) needed no
    repair.
    """
    kinds = torch.where(layout.edge, int(TokenSource.EDGE), int(TokenSource.FRESH))
    if recomputed is not None and exact is not None:
        kinds[layout.reusable] = int(TokenSource.REUSED)
        kinds[exact] = int(TokenSource.IN_PLACE)
        kinds[recomputed] = int(TokenSource.RECOMPUTED)
        if layout.reusable[-1]:
            kinds[-1] = int(TokenSource.FRESH)  # the last token is always computed
    kinds[:prefix] = int(TokenSource.PREFIX)
    borders = [border for span in layout.spans for border in (span.start, span.end)]
    return TokenSources.of(layout.prompt, layout.offsets[:, 0].numpy(), kinds.numpy(), borders)


def document_borders(tokens: Tokens, spans: Sequence[Span]) -> list[int]:
    """The rows at which the prompt's documents begin, and where the last one ends, sorted."""
    firsts = tokens.offsets[:, 0].contiguous()
    characters = torch.tensor([*(span.start for span in spans), *(span.end for span in spans[-1:])], dtype=torch.long)
    return sorted(set(torch.searchsorted(firsts, characters).tolist()))


class Reuse:
    """Prefill from stored chunks. Not for two threads at once; the engine's turns see to that."""

    def __init__(self, library: Library, index: ChunkIndex) -> None:
        self.library, self.fused, self._index = library, FusedVariants(library), index
        self._backbone = library.backbone
        self._rotary = library.backbone.rotary
        self._prefixes = PreambleCache()
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
            spans = recognise(backbone, self._index, prompt, hints)
            asked = find_question(prompt, spans, question, backbone.control_tokens, backbone.closing)
        scores = self._auxiliary_scores(auxiliary, method, ratio, spans, asked.text)
        with report.timed("tokenise"):
            tokens = fitting(backbone, backbone.tokenise_prompt(prompt, [(s.start, s.end) for s in spans]))
        with report.timed("load"):
            chunks, missing = self._load([span.key for span in spans], method)
        with report.timed("tokenise"):
            stored = [None if chunk is None else (chunk.ids, chunk.offsets) for chunk in chunks]
            layout = align(prompt, tokens.ids, tokens.offsets, spans, stored)

        count = len(layout)
        positions = shared_positions(layout) if method.positions == "shared" else torch.arange(count)
        canvas = backbone.canvas(slots(backbone, count, room) + _COPY)
        with report.timed("place"):
            prefix = self._place_prefix(layout, canvas)
            for number, row, part in layout.runs():
                chunk = chunks[number]
                assert chunk is not None
                canvas.place(chunk, part, row, self._rotary, int(positions[row]))
            exact = self._exact_rows(layout, chunks)

        held = layout.reusable.clone()
        held[count - 1] = False  # the last token's logits are wanted, so it is always computed
        rows = (held & ~exact).nonzero()[:, 0]
        applied = ratio
        if method.fitted_ratio is not None:
            tokens_each = torch.bincount(layout.chunk[rows] + 1, minlength=len(spans) + 1)[1:]
            report.fit = _mean(self._fits(spans, chunks), tokens_each)
            applied += (method.fitted_ratio - ratio) * report.fit
            report.requested_ratio = applied
        fresh = (~held).nonzero()[:, 0]
        fresh = fresh[fresh >= prefix]
        request = Request(
            layout=layout,
            positions=positions,
            chunks=tuple(chunks),
            canvas=canvas,
            backbone=backbone,
            auxiliary=scores,
            rows=rows,
            groups=layout.chunk[rows],
            fresh=fresh,
            question=asked.text,
            question_rows=asked.rows(layout),
        )
        everywhere = held.nonzero()[:, 0]  # a chunk whose KV is exact where it stands may be asked for as well
        if method.reorder and len(layout.chunk[everywhere].unique()) > 1:
            with report.timed("reorder"):
                prompt = _reordered(dataclasses.replace(request, rows=everywhere, groups=layout.chunk[everywhere]))
            method = dataclasses.replace(method, reorder=False)
            return self(prompt, method, ratio, room, report, auxiliary=auxiliary, question=asked.text, hints=hints)
        chosen = rows[:0]
        if budget := int(applied * len(rows) + 1e-9):
            with report.timed("select"):
                chosen = method.select.select(request, budget)
        with report.timed("recompute"):
            shape = method.attend.shape(request, chosen)
            logits, chosen = method.recompute.run(request, chosen, shape)
        self._prefixes.keep(layout.ids, _first(layout.reusable, 0), canvas)

        report.prompt_tokens, report.prefix = count, prefix
        report.recomputed, report.fresh = len(chosen), len(fresh)
        report.reused = count - prefix - len(chosen) - len(fresh)
        report.edges = int(layout.edge.sum())
        report.canvas_bytes = canvas.nbytes
        report.token_sources = token_sources(layout, prefix, chosen, exact)
        report.chunks = [self._use(layout, n, chosen, held, exact, missing) for n in range(len(spans))]
        report.fallbacks += [f"chunk {key[:12]} prefilled: {reason}" for key, reason in missing.items()]
        step = backbone.on_canvas(canvas, shift=int(positions.max()) + 1 - count, shape=shape)
        return Prefill(layout, canvas, logits, report, step)

    def forget(self, text: str, name: str) -> None:
        """Drop what is kept of a chunk; ``name`` is its key in the index."""
        self.library.store.delete([self.library.key(text)])
        self._prefixes = PreambleCache()  # a chunk whose KV was missing was part of a prompt's head

    def _load(self, keys: Sequence[str], method: Method) -> tuple[list[ChunkKV | None], dict[str, str]]:
        """Each span's chunk, if it is there, and by key the reason why others are not."""
        texts = [canonical(self._index.text(key) or "") for key in keys]
        chunks = [
            self.fused.get(text, ()) if method.fit is None else self.fused.fitting(text, texts[:number], method.fit)
            for number, text in enumerate(texts)
        ]
        missing = {
            key: _GONE if key == self.library.key(text) else _OTHERWISE.format(name=method.name)
            for key, text, chunk in zip(keys, texts, chunks, strict=True)
            if chunk is None
        }
        return chunks, missing

    def _fits(self, spans: Sequence[Span], chunks: Sequence[ChunkKV | None]) -> list[float]:
        """How well each span's KV context_fit what stands in front of it, 0..1 (see `fusion.context_fit`)."""
        texts = [canonical(self._index.text(span.key) or "") for span in spans]
        return [0.0 if c is None else context_fit(c.context, texts[:number]) for number, c in enumerate(chunks)]

    def _place_prefix(self, layout: Layout, canvas: Canvas) -> int:
        """Put the KV of the prompt's head on the canvas, where an earlier request left it; the number of its rows."""
        kept = self._prefixes.longest(layout.ids)
        if kept is None:
            return 0
        length = min(kept[0].shape[2], _first(layout.reusable, len(layout)), len(layout) - 1)
        if length:
            canvas.write(0, kept[0][:, :, :length], kept[1][:, :, :length])
        return length

    def _exact_rows(self, layout: Layout, chunks: Sequence[ChunkKV | None]) -> Tensor:
        """``[T]`` bool: chunk tokens that follow the very prefix they were encoded behind; their KV is right."""
        exact = torch.zeros(len(layout), dtype=torch.bool)
        if not self.library.lossless:
            return exact
        prefix = self.library.prefix_ids
        for number, row, part in layout.runs()[:1]:
            alone = (chunk := chunks[number]) is not None and not chunk.context
            if alone and part.start == 0 and row == len(prefix) and torch.equal(layout.ids[:row], prefix):
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
        starts, ends = layout.offsets.T
        inside = (starts >= span.start) & (starts < span.end) & (ends > starts)
        recomputed, placed = int(mine[chosen].sum()), int((held & mine).sum())
        return ChunkUse(
            key=span.key,
            start=span.start,
            end=span.end,
            reused=placed - recomputed,
            recomputed=recomputed,
            computed=int(inside.sum()) - placed,
            whole=len(span) == len(self._index.text(span.key) or ""),
            in_place=bool((exact & mine).any()),
            missing=missing.get(span.key),
        )


def _reordered(request: Request) -> str:
    """The prompt with its chunks in the order of the attention the question pays to them, the most attended one last.

    Texts trade places; what stands between them stays. Source: InfoFlow (arXiv 2603.05353), chunk reordering.
    """
    layout = request.layout
    flow = torch.zeros(len(layout.spans))
    flow.index_add_(0, request.groups, question_scores(request, request.backbone.full_layers).cpu())
    texts = [layout.prompt[span.start : span.end] for span in layout.spans]
    prompt, last = "", 0
    for span, number in zip(layout.spans, flow.argsort(stable=True).tolist(), strict=True):
        prompt += layout.prompt[last : span.start] + texts[number]
        last = span.end
    return prompt + layout.prompt[last:]


def shared_positions(layout: Layout) -> Tensor:
    """APE's positions ``[T]``: every chunk begins where the first one does, the text behind the last one comes after
    the longest. What stands between two chunks goes on from the one before it.
    """
    positions = torch.arange(len(layout))
    runs = layout.runs()
    if not runs:
        return positions
    start, reach = runs[0][1], 0
    rows = layout.reusable.nonzero()[:, 0]
    firsts: dict[int, int] = {}
    for row, span in zip(rows.tolist(), layout.chunk[rows].tolist(), strict=True):
        firsts.setdefault(span, row)
    borders = [*sorted(firsts.values()), int(rows[-1]) + 1]
    for first, stop in pairwise(borders):
        positions[first:stop] -= first - start
        reach = max(reach, stop - first)
    positions[borders[-1] :] -= borders[-1] - (start + reach)
    return positions


def slots(backbone: Backbone, count: int, room: int) -> int:
    """The size of a canvas for a prompt of ``count`` tokens and ``room`` more, as far as the model's window goes:
    "as many as you like" must not cost memory that no answer can fill.
    """
    return min(count + room, max(backbone.window, count))


def fitting(backbone: Backbone, tokens: Tokens) -> Tokens:
    """The tokens, or a `PromptError` when there are none or more than the model's window."""
    if not len(tokens):
        raise PromptError("the prompt is empty")
    if len(tokens) >= backbone.window:
        raise PromptError(
            f"the prompt has {len(tokens):,} tokens, the model's context window {backbone.window:,}: "
            "retrieve fewer or smaller chunks, or choose a model with a larger window"
        )
    return tokens


def _mean(numbers: Sequence[float], weights: Tensor) -> float:
    """The weighted mean; 0 where nothing weighs anything."""
    return float((torch.tensor(numbers) * weights).sum() / weights.sum()) if int(weights.sum()) else 0.0


def _first(mask: Tensor, otherwise: int) -> int:
    """Index of the first true element."""
    return int(mask.int().argmax()) if bool(mask.any()) else otherwise
