"""Prefill from stored chunks: place their KV, select rows, recompute these."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise

import torch
from torch import Tensor

from ..chunks import ChunkKV, canonical
from ..errors import ConfigurationError
from ..kv.collections import Collection, Collections
from ..kv.fit import prompt_fit
from ..methods import Method
from ..methods.auxiliary import Auxiliary, CharacterScores
from ..methods.recompute.base import Recomputed
from ..methods.recompute.once import Once
from ..methods.request import Request
from ..methods.select.query_guided import question_scores
from ..model.canvas import Canvas
from ..prompt import Layout, RenderedPrompt, Span, Stretch, Tokens, escaped, outright, rearranged
from ..report import ChunkUse, Report
from ..store import NotWorthLoading
from .loading import Loader
from .reading import Reading, read, workspace_size
from .result import Prefill, PrefillRequest
from .sources import sources_of
from .stages import Aligned, Loaded, Placed

log = logging.getLogger("cacheclip_rag")

_GONE = "its stored KV is gone or damaged"
_FORGOTTEN = "it was forgotten meanwhile"
_OTHERWISE = 'not encoded as {name} wants it; engine.ensure(texts, method="{name}") does so ahead'
"""For a chunk that is known in the encoding of another method only."""

_COPY = 64
"""Slots behind a prompt for a copy of its question, which selection may need behind the last chunk (tokens)."""


class Compose:
    """The strategy ``compose``: prefill from chunks that were encoded ahead, as the method wants them."""

    def __init__(self, collections: Collections, composer: Composer, loader: Loader) -> None:
        self._collections, self._composer, self._loader = collections, composer, loader

    def __call__(self, request: PrefillRequest, reading: Reading, report: Report) -> Prefill:
        collection = self._collections.of(request.method.encode)

        def load(reading: Reading) -> Loaded:
            return self._load(reading, collection, request.method)

        return self._composer(request, reading, collection, load, report)

    def _load(self, reading: Reading, collection: Collection, method: Method) -> Loaded:
        texts = [canonical(self._collections.index.text(span.key) or "") for span in reading.spans]
        loads = reading.loads or self._loader.begin_for(reading.spans, reading.tokens, method)
        chunks: list[ChunkKV | None] = []
        missing: dict[str, str] = {}
        for number, (span, text) in enumerate(zip(reading.spans, texts, strict=True)):
            chunk, why = None, _FORGOTTEN
            if text:
                mine = span.key == collection.library.key(text)
                why = _GONE if mine else _OTHERWISE.format(name=method.name)
                try:
                    chunk = loads.chunk(number)
                except NotWorthLoading as reason:
                    why = str(reason)
            chunks.append(chunk)
            if chunk is None:
                missing[span.key] = why
        return Loaded(chunks, missing, in_place=collection.library.lossless)


class Composer:
    """Places stored chunks, selects rows and recomputes them; the strategies ``compose`` and ``harvest`` share it.

    ``auxiliary`` is the auxiliary model, or None. Not thread-safe: callers hold the engine's lock.
    """

    def __init__(self, collections: Collections) -> None:
        self.auxiliary: Auxiliary | None = None
        self._backbone, self._index, self._cost = collections.backbone, collections.index, collections.cost
        self._escaped = False
        self._scoring: list[Future[list[CharacterScores]]] = []
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cacheclip-auxiliary")

    def __call__(
        self,
        asked: PrefillRequest,
        reading: Reading,
        collection: Collection,
        load: Callable[[Reading], Loaded],
        report: Report,
    ) -> Prefill:
        """Prefill ``asked`` with the chunks that ``load`` returns, or in full if reuse would take longer. On any
        exception but `PromptError`, the caller falls back to full prefill.
        """
        try:
            return self._prefill(asked, reading, collection, load, report)
        finally:
            wait(self._scoring)  # nothing computes, nor stores, once the caller has left the engine's lock
            self._scoring.clear()

    def _prefill(
        self,
        asked: PrefillRequest,
        reading: Reading,
        collection: Collection,
        load: Callable[[Reading], Loaded],
        report: Report,
    ) -> Prefill:
        if reason := escaped(reading.prompt, reading.spans, self._index.text):
            report.fallbacks.append(reason)
            if not self._escaped:  # an application that does so does it in every prompt
                log.warning(reason)
            self._escaped = True
        aligned = self._align(asked, reading, collection, load, report)
        if reason := _outright(asked, aligned.layout, collection, self._context_length(collection)):
            report.fallbacks.append(reason)
            return self._in_full(asked, aligned, collection, report)
        placed = self._place(asked, aligned, collection, report)
        if asked.method.reorder and len(placed.request.layout.chunk[placed.held].unique()) > 1:
            with report.timed("reorder"):
                prompt = _reordered(placed, reading.text)
            asked = dataclasses.replace(asked, prompt=prompt, question=reading.question.text)
            reading = read(self._backbone, self._index, asked, report)
            aligned = self._align(asked, reading, collection, load, report)
            placed = self._place(asked, aligned, collection, report)
        ratio = self._ratio(asked, placed, report)
        chosen = placed.request.rows[:0]
        if budget := int(ratio * len(placed.request.rows) + 1e-9):
            with report.timed("select"):
                chosen = asked.method.select.select(placed.request, budget)
        with report.timed("recompute"):
            score_mod = asked.method.attend.score_mod(placed.request, chosen)
            computed = self._cost.computing(self._backbone.device)
            done = asked.method.recompute.run(placed.request, chosen, score_mod)
            computed(len(done.rows) + len(placed.request.fresh))
        assert done.logits is not None
        layout, canvas = placed.request.layout, placed.canvas
        collection.preambles.keep(layout.ids, self._preamble(layout), canvas)
        self._report(report, placed, done)
        shift = int(placed.request.positions.max()) + 1 - len(layout)
        step = collection.library.backbone.on_canvas(canvas, shift=shift, score_mod=score_mod, soft=report.soft_tokens)
        return Prefill(layout.text_only(), canvas, done.logits, report, step)

    def _context_length(self, collection: Collection) -> int:
        """Tokens, with soft ones: those of the engine's model, or of the collection's if that has less."""
        return min(self._backbone.context_length, collection.library.backbone.context_length)

    def _in_full(self, asked: PrefillRequest, aligned: Aligned, collection: Collection, report: Report) -> Prefill:
        """Full prefill, except for a preamble that an earlier prompt had."""
        placed = self._place(asked, aligned.without_chunks(), collection, report)
        layout, canvas = placed.request.layout, placed.canvas
        with report.timed("recompute"):
            computed = self._cost.computing(self._backbone.device)
            done = Once().run(placed.request, placed.request.rows, None)
            computed(len(placed.request.rows) + len(placed.request.fresh))
        assert done.logits is not None
        collection.preambles.keep(layout.ids, self._preamble(aligned.layout), canvas)
        self._report(report, placed, done)
        step = collection.library.backbone.on_canvas(canvas)
        return Prefill(layout, canvas, done.logits, report, step)

    def _preamble(self, layout: Layout) -> int:
        """The rows before the first stored chunk, and before what was forgotten since the prompt was read."""
        gone = [span.start for span in layout.spans if span.key not in self._index][:1]
        rows = int((layout.offsets[:, 1] <= gone[0]).sum()) if gone else len(layout)
        return min(_first(layout.reusable, 0), rows)

    def after_fork(self) -> None:
        """In a forked process, the parent's threads are gone."""
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cacheclip-auxiliary")
        self._scoring = []

    # ---- place ----------------------------------------------------------------------------------------------------

    def _align(
        self,
        asked: PrefillRequest,
        reading: Reading,
        collection: Collection,
        load: Callable[[Reading], Loaded],
        report: Report,
    ) -> Aligned:
        """Load the chunks, align the prompt's tokens with theirs, and make room for soft tokens."""
        scores = self._auxiliary_scores(asked, reading)
        with report.timed("load"):
            loaded = load(reading)
        with report.timed("tokenise"):
            tokens = [None if chunk is None else Tokens(chunk.ids, chunk.offsets) for chunk in loaded.chunks]
            layout = reading.layout(list(zip(reading.spans, tokens, strict=True)))
            layout = collection.library.soft.around(layout, tokens)
        return Aligned(reading, loaded, layout, scores)

    def _place(self, asked: PrefillRequest, aligned: Aligned, collection: Collection, report: Report) -> Placed:
        """Place the KV of the chunks on a canvas."""
        backbone, method, reading = collection.library.backbone, asked.method, aligned.reading
        loaded, layout = aligned.loaded, aligned.layout
        with report.timed("tokenise"):
            # A caller's question may contain lone surrogates, which no tokenizer takes; it must not fail the request.
            text = reading.question.text.encode("utf-8", "replace").decode()
            question_ids = backbone.tokenise("\n\n" + text, plain=True).ids
        count = len(layout)
        positions = shared_positions(layout) if method.positions == "shared" else torch.arange(count)
        canvas = backbone.canvas(workspace_size(backbone, count, asked.room) + _COPY)
        with report.timed("place"):
            prefix = _place_preamble(layout, canvas, collection)
            for number, row, part in layout.runs():
                chunk = loaded.chunks[number]
                assert chunk is not None
                canvas.place(chunk, part, row, int(positions[row]))
            in_place = _in_place(layout, loaded, collection)
        held = layout.reusable.clone()
        held[count - 1] = False  # the last token is always computed, because its logits are needed
        rows, fresh = (held & ~in_place & ~layout.soft).nonzero()[:, 0], (~held).nonzero()[:, 0]
        request = Request(
            layout=layout,
            positions=positions,
            chunks=tuple(loaded.chunks),
            workspace=canvas,
            computer=backbone.computer,
            auxiliary=aligned.scores,
            rows=rows,
            groups=layout.chunk[rows],
            fresh=fresh[fresh >= prefix],
            question=reading.question.text,
            question_rows=reading.question.rows(layout),
            question_ids=question_ids,
        )
        return Placed(request, canvas, loaded, prefix, held, in_place)

    def _auxiliary_scores(self, asked: PrefillRequest, reading: Reading) -> Callable[[str], list[CharacterScores]]:
        """A function that returns the auxiliary model's scores. On a device of its own, scoring starts at once and runs
        while KV is loaded.
        """
        auxiliary, method = self.auxiliary, asked.method

        def score(layers: str) -> list[CharacterScores]:
            if auxiliary is None:
                raise ConfigurationError(f'method "{method.name}" needs an auxiliary model')
            texts = [self._index.text(span.key) or "" for span in reading.spans]
            return auxiliary.score(texts, reading.question.text, layers)

        apart = auxiliary is not None and auxiliary.backbone.device != self._backbone.device
        if not (apart and method.select.needs_auxiliary and asked.ratio and reading.spans):
            return score
        future = self._threads.submit(score, getattr(method.select, "layers", "last"))
        self._scoring.append(future)
        return lambda layers: future.result()

    # ---- what to recompute, and what was ----------------------------------------------------------------------------

    def _ratio(self, asked: PrefillRequest, placed: Placed, report: Report) -> float:
        """The share of ``request.rows`` to recompute: the requested one, or less if the contexts of variants fit."""
        if asked.method.fitted_ratio is None:
            return asked.ratio
        spans, layout = placed.request.layout.spans, placed.request.layout
        texts = [canonical(self._index.text(span.key) or "") for span in spans]
        report.fit = prompt_fit(placed.request.chunks, texts, layout.tokens_each(placed.request.rows))
        report.requested_ratio = asked.method.ratio(asked.ratio, report.fit)
        return report.requested_ratio

    def _report(self, report: Report, placed: Placed, done: Recomputed) -> None:
        layout, soft = placed.request.layout, placed.request.layout.soft
        fresh, report.soft_tokens = int((~soft[placed.request.fresh]).sum()), int(soft.sum())
        report.prefix, report.recomputed, report.fresh = placed.prefix, len(done.rows), fresh
        report.reused = len(layout) - report.soft_tokens - placed.prefix - len(done.rows) - fresh
        report.adjusted, report.edges = len(done.adjusted), int(layout.edge.sum())
        report.canvas_bytes = placed.canvas.nbytes
        report.token_sources = sources_of(layout, placed.prefix, done.rows, placed.in_place, done.adjusted)
        report.chunks = [self._use(placed, number, span, done.rows) for number, span in enumerate(layout.spans)]
        report.fallbacks += [f"chunk {key[:12]} prefilled: {why}" for key, why in placed.loaded.missing.items()]

    def _use(self, placed: Placed, number: int, span: Span, recomputed_rows: Tensor) -> ChunkUse:
        layout = placed.request.layout
        mine, (starts, ends) = layout.chunk == number, layout.offsets.T
        inside = (starts >= span.start) & (starts < span.end) & (ends > starts)
        held = int((placed.held & mine & ~layout.soft).sum())
        recomputed = int(mine[recomputed_rows].sum())
        return ChunkUse(
            key=span.key,
            start=span.start,
            end=span.end,
            reused=held - recomputed,
            recomputed=recomputed,
            computed=int(inside.sum()) - held,
            whole=self._index.whole(span),
            in_place=bool((placed.in_place & mine).any()),
            missing=placed.loaded.missing.get(span.key),
        )


def _outright(asked: PrefillRequest, layout: Layout, collection: Collection, length: int) -> str | None:
    """Why the whole prompt had better be prefilled, or None (see `prompt.outright`). ``length``: of the context."""
    if len(layout) >= length and bool(layout.soft.any()):
        return f"full prefill: with soft tokens the prompt has {len(layout):,}, the context length is {length:,}"
    if asked.ratio >= 1.0:  # somebody wants every row recomputed
        return None
    kept = collection.preambles.longest(layout.ids)
    prefix = 0 if kept is None else min(kept[0].shape[2], _first(layout.reusable, len(layout)))
    passes = getattr(asked.method.select, "passes", 0.0) if asked.ratio else 0.0
    return outright(layout, passes, prefix, asked.ratio)


def shared_positions(layout: Layout) -> Tensor:
    """APE's shared positions ``[T]``: every chunk begins at the position of the first one, and the text behind the last
    chunk follows the longest. Text between two chunks continues from the one before it.
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


def _place_preamble(layout: Layout, canvas: Canvas, collection: Collection) -> int:
    """Place the KV of the prompt's preamble, if an earlier prompt had it; returns the number of its rows."""
    kept = collection.preambles.longest(layout.ids)
    if kept is None:
        return 0
    length = min(kept[0].shape[2], _first(layout.reusable, len(layout)), len(layout) - 1)
    if length:
        canvas.write(0, kept[0][:, :, :length], kept[1][:, :, :length])
    return length


def _in_place(layout: Layout, loaded: Loaded, collection: Collection) -> Tensor:
    """``[T]`` bool: the tokens of a chunk in place, right behind its encode prefix, whose KV needs no repair."""
    in_place = torch.zeros(len(layout), dtype=torch.bool)
    if not loaded.in_place:
        return in_place
    prefix = collection.library.prefix_ids
    for number, row, part in layout.runs()[:1]:
        alone = (chunk := loaded.chunks[number]) is not None and not chunk.context
        if alone and part.start == 0 and row == len(prefix) and torch.equal(layout.ids[:row], prefix):
            in_place[row : row + part.stop] = True
    return in_place


def _reordered(placed: Placed, text: Sequence[Stretch]) -> str:
    """The prompt with its chunks sorted by the question's attention to them, the highest last.

    Chunk texts are permuted; the text between them stays. Source: InfoFlow (arXiv 2603.05353), chunk reordering.
    """
    layout = placed.request.layout
    rows = placed.held.nonzero()[:, 0]  # a chunk that is in place may be attended to as well
    request = dataclasses.replace(placed.request, rows=rows, groups=layout.chunk[rows])
    flow = torch.zeros(len(layout.spans), dtype=torch.float32)
    flow.index_add_(0, request.groups, question_scores(request, request.computer.full_layers).cpu())
    pieces, last = list[Stretch](), 0
    for span, number in zip(layout.spans, flow.argsort(stable=True).tolist(), strict=True):
        other = layout.spans[number]
        pieces += [(last, span.start), (other.start, other.end)]
        last = span.end
    whole = layout.prompt if isinstance(layout.prompt, RenderedPrompt) else RenderedPrompt(layout.prompt, text)
    return rearranged(whole, [*pieces, (last, len(whole))])


def _first(mask: Tensor, otherwise: int) -> int:
    """The index of the first true element, else ``otherwise``."""
    return int(mask.int().argmax()) if bool(mask.any()) else otherwise
