"""Fills the blocks of requests before vLLM's step: places chunk KV, selects rows, recomputes them; encodes chunks."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cacheclip_rag.chunks import ChunkKV
from cacheclip_rag.compute import Part
from cacheclip_rag.kv.encode import Encoder
from cacheclip_rag.kv.fit import prompt_fit
from cacheclip_rag.methods.request import Request
from cacheclip_rag.prefill.sources import sources_of
from cacheclip_rag.prompt import Layout

from . import seams
from .batch import Batch
from .computer import Forward, Keep, PagedComputer, PagedWorkspace, Tables
from .libraries import Libraries
from .plan import Done, Plan, needs_every_key

log = logging.getLogger("cacheclip_rag")

Ask = Callable[[Any], Any]

_FEW = 64
"""Rows that cost less when they are computed twice, beside others, than in a pass of their own."""


class Filler:
    """Fills blocks with a worker's model. ``most``: rows of a pass."""

    def __init__(self, model: seams.Model, libraries: Libraries, most: int) -> None:
        self.model, self.libraries, self._most = model, libraries, most
        self.tables = Tables(model)
        self._fronts: dict[Encoder, tuple[Tensor, Tensor]] = {}
        rank, ranks = seams.rank()
        heads, mine = libraries.model.kv_heads, model.heads[0][1]
        first = rank * heads // ranks
        self._heads = slice(first, first + mine)

    @torch.inference_mode()
    def fill(self, plans: Sequence[Plan], chunks: Mapping[str, Mapping[str, ChunkKV]]) -> list[Done]:
        """Carry out these plans, all of one step, in passes that they share. ``chunks``: each request's, by key.

        A plan that fails says so, and vLLM computes its request.
        """
        start, batch = time.perf_counter(), Batch(self.model, self._most, self.libraries.cost)
        works = [_Work(self, plan, chunks.get(plan.request, {})) for plan in plans]
        results = batch.run([work.run for work in works])
        seconds = time.perf_counter() - start
        done = []
        for work, result in zip(works, results, strict=True):
            if isinstance(result, Exception):
                log.warning("a request is computed by vLLM, since reuse failed: %r", result, exc_info=result)
                done.append(Done(failed=f"reuse failed: {result!r}"))
                continue
            if work.plan.encode is not None:
                result = {"stored": self._store(work)}
            shared = {"seconds": round(seconds, 6), "requests": len(plans), "passes": batch.passes}
            done.append(Done({**result, "pass": shared}))
        return done

    # ---- the encode prefix -------------------------------------------------------------------------------------------

    def front(self, plan: Plan) -> tuple[Tensor, Tensor] | None:
        """KV ``[L, Hk, P, D]`` of the plan's encode prefix, this rank's heads, if an earlier pass computed it."""
        return self._fronts.get(plan.method.encode) if plan.prefix else None

    def keep_front(self, plan: Plan, workspace: PagedWorkspace) -> None:
        self._fronts[plan.method.encode] = workspace.read(slice(0, plan.prefix))

    # ---- workspaces and chunks ---------------------------------------------------------------------------------------

    def workspace(self, plan: Plan) -> PagedWorkspace:
        blocks = torch.tensor([*plan.blocks, *plan.spare], dtype=torch.int32)
        return PagedWorkspace(self.model, self.tables, blocks, plan.first, self._heads)

    def _store(self, work: _Work) -> bool:
        """Gather a computed chunk's heads from the ranks and store it; whether it was kept."""
        plan, encode = work.plan, work.plan.encode
        assert encode is not None and work.workspace is not None
        library = self.libraries.of(plan.tenant, plan.method.encode)
        tokens = self.libraries.model.tokenise(encode.text, plain=True)
        keys, values = work.workspace.read(slice(encode.start, encode.start + len(tokens)))
        heads = self.libraries.model.kv_heads
        keys, values = seams.gather_heads(keys, heads).cpu(), seams.gather_heads(values, heads).cpu()
        if seams.rank()[0]:
            return True
        chunk = ChunkKV(
            encode.text,
            tokens.ids,
            tokens.offsets,
            keys,
            values,
            encode.start,
            context=encode.context,
        )
        return library.store.put(library.key(encode.text, encode.context), chunk)


class _Work:
    """One plan being carried out; `run` is called in a thread of its own, and asks for forwards."""

    def __init__(self, filler: Filler, plan: Plan, chunks: Mapping[str, ChunkKV]) -> None:
        self.plan = plan
        self._filler, self._chunks = filler, chunks
        self.workspace: PagedWorkspace | None = None

    def run(self, ask: Ask) -> dict[str, Any]:
        plan, filler = self.plan, self._filler
        layout = plan.layout()
        workspace = self.workspace = filler.workspace(plan)
        computer = PagedComputer(filler.model, filler.tables, workspace, ask)
        known = self._place(layout, workspace)
        count = len(layout)
        held = layout.reusable.clone()
        held[count - 1] = False
        held[:known] = True
        if plan.encode is not None:
            rows = (~held[:-1]).nonzero()[:, 0]
            ask(Forward([Part(workspace, layout.ids[rows], rows, hooks=[Keep()])], None))
            self._note_front(known)
            return {}
        self._compute_head(ask, layout, workspace, known, held)
        in_place = self._in_place(layout)
        reusable = layout.reusable.clone()
        reusable[count - 1] = False
        rows, fresh = (reusable & ~in_place).nonzero()[:, 0], (~held).nonzero()[:, 0]
        request = Request(
            layout=layout,
            positions=torch.arange(count),
            chunks=tuple(None if place.key is None else self._chunks[place.key] for place in plan.places),
            workspace=workspace,
            computer=computer,
            auxiliary=_no_auxiliary,
            rows=rows,
            groups=layout.chunk[rows],
            fresh=fresh,
            question="",
            question_rows=torch.from_numpy(plan.question),
            question_ids=torch.from_numpy(plan.question_ids),
            logits=0,
        )
        fit = prompt_fit(request.chunks, [place.text for place in plan.places], layout.tokens_each(rows))
        ratio = plan.method.ratio(plan.ratio, fit)
        chosen = rows[:0]
        if budget := int(ratio * len(rows) + 1e-9):
            chosen = plan.method.select.select(request, budget)
        # The selection needs the last row's query; its KV is vLLM's to compute.
        rest = dataclasses.replace(request, fresh=fresh[:-1])
        done = plan.method.recompute.run(rest, chosen, None)
        return self._report(layout, in_place, done.rows, done.adjusted, ratio, fit)

    def _place(self, layout: Layout, workspace: PagedWorkspace) -> int:
        """Place the stored KV; returns how many rows of the encode prefix are among it."""
        known = 0
        if (front := self._filler.front(self.plan)) is not None:
            workspace.write(0, *front)
            known = self.plan.prefix
        for number, row, tokens in layout.runs():
            key = self.plan.places[number].key
            assert key is not None
            workspace.place(self._chunks[key], tokens, row)
        workspace.flush()
        return known

    def _compute_head(self, ask: Ask, layout: Layout, workspace: PagedWorkspace, known: int, held: Tensor) -> None:
        """Compute what stands before the first chunk that needs repair, in a pass of its own where the selection needs
        its keys, where the prefix's KV is to be kept, and where it is long. A few rows are computed with the question
        and the chosen rows instead. Marks in ``held`` what is there then.
        """
        plan = self.plan
        head = (~held[: plan.head]).nonzero()[:, 0]
        held[: plan.first] = True
        if not needs_every_key(plan.method) and (known or not plan.prefix):
            head = head[head >= plan.first]
            if len(head) <= _FEW:
                return
        held[: plan.head] = True
        if len(head):
            ask(Forward([Part(workspace, layout.ids[head], head, hooks=[Keep()])], None))
            self._note_front(known)

    def _note_front(self, known: int) -> None:
        if self.plan.prefix and not known and (self.plan.encode is not None or self.plan.head >= self.plan.prefix):
            assert self.workspace is not None
            self._filler.keep_front(self.plan, self.workspace)

    def _in_place(self, layout: Layout) -> Tensor:
        """``[T]`` bool: the tokens of a chunk right behind its encode prefix, whose KV needs no repair."""
        return layout.reusable & (torch.arange(len(layout)) < self.plan.head)

    def _report(
        self, layout: Layout, in_place: Tensor, recomputed: Tensor, adjusted: Tensor, ratio: float, fit: float
    ) -> dict[str, Any]:
        plan = self.plan
        sources = sources_of(layout, plan.first, recomputed, in_place, adjusted)
        report = {
            "method": plan.method.name,
            "requested_ratio": ratio,
            "fit": fit,
            "prompt_tokens": len(layout),
            "tokens": {source.name.lower(): count for source, count in sources.counts().items() if count},
            "chunks": len(plan.places),
            "fallbacks": [place.missing for place in plan.places if place.missing],
        }
        if plan.sources:
            report["sources"] = [[run.source.name.lower(), run.tokens] for run in sources.runs()]
        return report


def _no_auxiliary(layers: str) -> Any:
    raise NotImplementedError("methods with an auxiliary model are refused before")
