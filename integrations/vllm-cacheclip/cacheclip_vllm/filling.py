"""Fills the blocks of requests before vLLM's step: places chunk KV, selects rows, recomputes them; encodes chunks."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cacheclip_rag.chunks import ChunkKV
from cacheclip_rag.compute import Part
from cacheclip_rag.kv.fit import prompt_fit
from cacheclip_rag.methods.auxiliary import CharacterScores
from cacheclip_rag.methods.request import Request
from cacheclip_rag.prefill.sources import sources_of
from cacheclip_rag.prompt import Layout

from . import seams
from .auxiliary import WorkerAuxiliary
from .batch import Batch
from .beginnings import Beginnings
from .computer import Forward, Keep, Mean, PagedComputer, PagedWorkspace, Tables
from .libraries import Libraries
from .plan import Done, Plan, needs_every_key

log = logging.getLogger("cacheclip_rag")

Ask = Callable[[Any], Any]

_FEW = 64
"""Rows that cost less when they are computed twice, beside others, than in a pass of their own."""


class Filler:
    """Fills blocks with a worker's model. ``most``: rows of a pass; ``auxiliary``: the model that some methods ask."""

    def __init__(
        self, model: seams.Model, libraries: Libraries, most: int, auxiliary: WorkerAuxiliary | None = None
    ) -> None:
        self.auxiliary = auxiliary
        self.model, self.libraries, self._most = model, libraries, most
        self.tables = Tables(model)
        self._beginnings = Beginnings()
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
        begun = [self._beginnings.find(plan.salt, plan.ids[: plan.shared]) for plan in plans]
        works = [
            _Work(self, plan, chunks.get(plan.request, {}), known) for plan, known in zip(plans, begun, strict=True)
        ]
        results = batch.run([work.run for work in works])
        seconds = time.perf_counter() - start
        done = []
        for work, result in zip(works, results, strict=True):
            if isinstance(result, Exception):
                log.warning("a request is computed by vLLM, since reuse failed: %r", result, exc_info=result)
                done.append(Done(failed=f"reuse failed: {result!r}"))
                continue
            if (more := work.beginning()) is not None:
                self._beginnings.keep(work.plan.salt, work.plan.ids[: work.plan.shared], *more)
            if work.plan.encode is not None:
                result = {"stored": self._store(work)}
            shared = {"seconds": round(seconds, 6), "requests": len(plans), "passes": batch.passes}
            done.append(Done({**result, "pass": shared}))
        return done

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
    """One plan being carried out; `run` is called in a thread of its own, and asks for forwards. ``begun``: KV of the
    prompt's first rows that is there already.
    """

    def __init__(
        self, filler: Filler, plan: Plan, chunks: Mapping[str, ChunkKV], begun: tuple[Tensor, Tensor] | None
    ) -> None:
        self.plan = plan
        self._filler, self._chunks, self._begun = filler, chunks, begun
        self._known = 0 if begun is None else begun[0].shape[2]
        self.workspace: PagedWorkspace | None = None

    def run(self, ask: Ask) -> dict[str, Any]:
        plan, filler = self.plan, self._filler
        layout = plan.layout()
        workspace = self.workspace = filler.workspace(plan)
        computer = PagedComputer(filler.model, filler.tables, workspace, ask, keep=plan.shared)
        self._place(layout, workspace)
        count = len(layout)
        held = layout.reusable.clone()
        held[count - 1] = False
        held[: self._known] = True
        if plan.encode is not None:
            rows = (~held[:-1]).nonzero()[:, 0]
            ask(Forward([Part(workspace, layout.ids[rows], rows, hooks=[Keep()])], None))
            return {}
        self._compute_head(ask, layout, workspace, held)
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
            auxiliary=lambda layers: self._auxiliary_scores(ask, layers),
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

    def beginning(self) -> tuple[Tensor, Tensor] | None:
        """KV ``[L, Hk, n, D]`` of the rows that later prompts may share, if more of it is known now than before."""
        if not self._known < self.plan.shared or self._known < self.plan.first:  # vLLM's own rows cannot be read
            return None
        assert self.workspace is not None
        return self.workspace.read(slice(0, self.plan.shared))

    def _place(self, layout: Layout, workspace: PagedWorkspace) -> None:
        """Place the stored KV."""
        if self._begun is not None:
            workspace.write(0, *self._begun)
        for number, row, tokens in layout.runs():
            key = self.plan.places[number].key
            assert key is not None
            workspace.place(self._chunks[key], tokens, row)
        workspace.flush()

    def _compute_head(self, ask: Ask, layout: Layout, workspace: PagedWorkspace, held: Tensor) -> None:
        """Compute what stands before the first chunk that needs repair, in a pass of its own where the selection needs
        its keys, and where it is long. A few rows are computed with the question and the chosen rows instead. Marks in
        ``held`` what is there then.
        """
        plan = self.plan
        head = (~held[: plan.head]).nonzero()[:, 0]
        held[: plan.first] = True
        if not needs_every_key(plan.method):
            head = head[head >= plan.first]
            if len(head) <= _FEW:
                return
        held[: plan.head] = True
        if len(head):
            ask(Forward([Part(workspace, layout.ids[head], head, hooks=[Keep()])], None))

    def _auxiliary_scores(self, ask: Ask, layers: str) -> list[CharacterScores]:
        assert self._filler.auxiliary is not None, "a method that needs it is refused without"
        found = self._filler.auxiliary.score(self.plan, self._chunks, layers)
        scores = torch.from_numpy(np.concatenate([one.scores for one in found])).to(self._filler.model.device)
        agreed = ask(Mean(scores)).cpu().split([len(one.scores) for one in found])
        return [dataclasses.replace(one, scores=mine.numpy()) for one, mine in zip(found, agreed, strict=True)]

    def _in_place(self, layout: Layout) -> Tensor:
        """``[T]`` bool: the tokens of a chunk right behind its encode prefix, whose KV needs no repair."""
        return layout.reusable & (torch.arange(len(layout)) < self.plan.head)

    def _report(
        self, layout: Layout, in_place: Tensor, recomputed: Tensor, adjusted: Tensor, ratio: float, fit: float
    ) -> dict[str, Any]:
        plan = self.plan
        sources = sources_of(layout, max(plan.first, self._known), recomputed, in_place, adjusted)
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
