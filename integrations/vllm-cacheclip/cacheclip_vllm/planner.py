"""The scheduler's half: recognises chunks in new requests, plans how they are filled, and holds them to the budget."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np

from cacheclip_rag.chunks import canonical
from cacheclip_rag.corpus.usage import Usage
from cacheclip_rag.errors import CacheClipError
from cacheclip_rag.kv.encode import Encoder
from cacheclip_rag.methods import Method
from cacheclip_rag.prompt import outright

from . import seams
from .index import Match, TokenIndex
from .libraries import Libraries
from .plan import Encode, Load, Options, Place, Plan, options

log = logging.getLogger("cacheclip_rag")

COPY = 64
"""Tokens of a question that is copied behind the prompt, at most."""
_HELD = 2
"""Prompts of a step have at most so many tokens as passes have rows, times this: each one's KV is kept at hand once
more while its blocks are filled."""
_OTHERWISE = 'not encoded as {name} wants it: add its chunks with "method": "{name}"'


class Known:
    """The chunks of one tenant as the scheduler knows them: token ids and keys, no KV."""

    def __init__(self, libraries: Libraries, tenant: str) -> None:
        self._libraries, self._tenant = libraries, tenant
        self.index = TokenIndex()
        self._usage: dict[Encoder, Usage] = {}
        self._seen: dict[Encoder, int] = {}
        self._texts: dict[Encoder, set[str]] = {}

    def follow(self, encoder: Encoder) -> None:
        """Take note of what other processes stored and removed: a look at the folder, and at new files' headers."""
        self._libraries.of(self._tenant, encoder)
        self._libraries.place(self._tenant).refresh()
        for other in [*self._seen, *([] if encoder in self._seen else [encoder])]:
            library = self._libraries.of(self._tenant, other)
            if self._seen.get(other) == library.store.changes:
                continue
            self._seen[other] = library.store.changes
            self._libraries.variants(self._tenant, other).refresh()
            self._texts[other] = {entry.text for entry in library.store.entries() if not entry.context}
            self._update()

    def _update(self) -> None:
        texts = set[str]().union(*self._texts.values())
        for text in self.index.names() - texts:
            self.index.remove(text)
        for text in texts - self.index.names():
            self.index.add(text, self._libraries.model.tokenise(text, plain=True).ids.numpy())

    def note(self, encoder: Encoder, texts: Sequence[str], saving: Executor) -> None:
        """Count that these chunks came together; saved by another thread, since this one must not wait for a disk."""
        if encoder not in self._usage:
            self._usage[encoder] = self._libraries.usage(self._tenant, encoder)
        library, usage = self._libraries.of(self._tenant, encoder), self._usage[encoder]
        if usage.note([library.key(text) for text in texts]):
            saving.submit(usage.save)

    def save(self) -> None:
        for usage in self._usage.values():
            usage.save()

    def place(self, matches: Sequence[Match], before: Sequence[str], method: Method) -> Place:
        """The stretches of one chunk in a prompt, with the key of the variant that fits best behind ``before``."""
        text, runs = matches[0].name, tuple((match.row, match.offset, match.length) for match in matches)
        if text not in self._texts.get(method.encode, ()):
            return Place(text, None, runs, missing=_OTHERWISE.format(name=method.name))
        variants = self._libraries.variants(self._tenant, method.encode)
        context: tuple[str, ...] = ()
        if method.fit is not None:
            context = method.fit.choose([(), *variants.held(text)], before)
        return Place(text, variants.key(text, context), runs)


class Planner:
    """Plans requests. Not thread-safe: the scheduler's own thread calls it.

    ``most``: rows that all plans of a step may compute, and a pass takes; ``ranks``: workers that load chunks;
    ``auxiliary``: whether they have an auxiliary model.
    """

    def __init__(
        self,
        libraries: Libraries,
        default: Method,
        *,
        block: int,
        hashed: int,
        most: int,
        ranks: int,
        auxiliary: bool = False,
    ) -> None:
        self._libraries, self._default, self._auxiliary = libraries, default, auxiliary
        self._block, self._hashed, self._most, self._ranks = block, hashed, most, ranks
        self._known: dict[str, Known] = {}
        self.plans: dict[str, Plan] = {}
        self.reasons: dict[str, str] = {}
        """Why requests are served without reuse, by request."""
        self._loading: dict[str, int] = {}
        self.to_load: list[Load] = []
        """What workers are to load for new plans."""
        self.dropped: list[str] = []
        """Requests whose chunks workers need no longer."""
        self._at_workers: set[str] = set()
        self.ready: list[Plan] = []
        """Plans of requests that are part of the step being scheduled."""
        self._saving = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cacheclip-usage")
        self._busy = self._tokens = 0
        self.loan: seams.Loan | None = None
        """Where blocks for copies of questions come from."""
        self._model = libraries.model
        self._closing = self._model.tokenise(self._model.closing).ids.numpy()
        self._turn = self._model.turn()
        self.known("").follow(default.encode)

    def known(self, tenant: str) -> Known:
        if tenant not in self._known:
            self._known[tenant] = Known(self._libraries, tenant)
        return self._known[tenant]

    # ---- a new request -----------------------------------------------------------------------------------------------

    def add(self, request: Any, given: Any, caching: bool) -> None:
        """Plan a new request with the options ``given``; ``caching``: whether vLLM's prefix cache is on."""
        try:
            asked = options(given, self._default, self._auxiliary)
            plan = self._encoding(request, asked) if asked.encode is not None else self._plan(request, asked)
        except CacheClipError as error:
            plan = str(error)
        except Exception as error:  # of the store, for example: it must not end vLLM's scheduler
            log.exception("cacheclip: a request is served without reuse")
            plan = f"it could not be planned: {error!r}"
        if isinstance(plan, str):
            self.reasons[request.request_id] = plan
            return
        self.plans[request.request_id] = plan
        plan.shared, plan.salt = (self._begins(plan) if caching else plan.prefix), seams.salt(request)
        if caching:
            seams.keep_private(request, self._shared(plan) // self._block, self._hashed, self._block)
        self._load(plan)

    def _load(self, plan: Plan) -> None:
        """Have the workers load the plan's chunks; it is carried out in none of the steps before they have."""
        if plan.keys:
            self._loading[plan.request] = self._ranks
            self.to_load.append(Load(plan.request, plan.tenant, plan.method.encode, plan.keys))

    def _shared(self, plan: Plan) -> int:
        """Rows before it, down to a block's border, are exact, and their blocks may be shared."""
        return 0 if plan.encode is not None else plan.head

    def _begins(self, plan: Plan) -> int:
        """The rows before its first chunk, all of which are exact."""
        if plan.encode is not None:
            return plan.prefix
        return min(plan.head, *(place.runs[0][0] for place in plan.places if place.key is not None))

    def _plan(self, request: Any, asked: Options) -> Plan | str:
        """The plan of a prompt, or why nothing of it is reused."""
        if not asked.reuse:
            return "not wanted"
        ids = np.asarray(request.prompt_token_ids, dtype=np.int64)
        known = self.known(asked.tenant)
        known.follow(asked.method.encode)
        prefix = self._libraries.of(asked.tenant, asked.method.encode).prefix_ids.numpy()
        begins = len(prefix) if np.array_equal(ids[: len(prefix)], prefix) else 0  # no chunk reaches into it
        found = known.index.find(ids[begins:-1])  # the last row is vLLM's
        matches = [dataclasses.replace(match, row=match.row + begins) for match in found]
        if not matches:
            return "no chunk in this prompt has stored KV"
        places: list[Place] = []
        for group in _by_chunk(matches):
            places.append(known.place(group, [place.text for place in places], asked.method))
        if not any(place.key for place in places):
            return str(places[0].missing)
        rows = self._question(ids, matches)
        plan = Plan(
            request=request.request_id,
            ids=ids,
            tenant=asked.tenant,
            method=asked.method,
            ratio=asked.ratio,
            prefix=begins,
            places=places,
            question=rows,
            question_ids=self._copy(ids[rows]),
            sources=asked.sources,
        )
        known.note(asked.method.encode, [place.text for place in places], self._saving)
        plan.head = self._head(plan, len(prefix))
        return self._too_much(plan) or plan

    def _head(self, plan: Plan, prefix: int) -> int:
        """The first row of a chunk that needs repair; all rows before it are exact. A chunk is in place if it begins
        the prompt behind its encode prefix, and was computed there by itself.
        """
        library = self._libraries.of(plan.tenant, plan.method.encode)
        stored = [place for place in plan.places if place.key is not None]
        row, offset, _ = stored[0].runs[0]
        alone = stored[0].key == library.key(stored[0].text)
        if not (library.lossless and alone and offset == 0 and row == prefix == plan.prefix):
            return row
        runs = [run for place in stored for run in place.runs]
        return runs[1][0] if len(runs) > 1 else len(plan.ids) - 1

    def _too_much(self, plan: Plan) -> str | None:
        """Why vLLM had better compute the whole prompt, or None."""
        if (reason := self._exceeds(plan)) is not None or plan.ratio >= 1.0:
            return reason
        passes = getattr(plan.method.select, "passes", 0.0) if plan.ratio else 0.0
        return outright(plan.layout(), passes, plan.prefix, plan.ratio)

    def _exceeds(self, plan: Plan) -> str | None:
        if plan.cost <= self._most:
            return None
        return (
            f"{plan.cost:,} rows would have to be computed in one pass of at most {self._most:,}: lower the recompute "
            "ratio, or raise --max-num-batched-tokens"
        )

    def _question(self, ids: np.ndarray, matches: Sequence[Match]) -> np.ndarray:
        """The question's rows: behind the last chunk without the template's closing, or, where nothing is said there,
        before the first, from the user's turn on (see `prompt.find_question`).
        """
        last, first, stop = matches[-1].row + matches[-1].length, matches[0].row, len(ids)
        if len(self._closing) and np.array_equal(ids[max(last, stop - len(self._closing)) :], self._closing):
            stop -= len(self._closing)
        for rows in (np.arange(last, stop), np.arange(self._turn_begins(ids[:first]), first)):
            if any(character.isalnum() for character in self._model.say(ids[rows])):
                return rows
        return np.arange(0)

    def _turn_begins(self, ids: np.ndarray) -> int:
        """The row behind the last of these tokens that open a user's turn in the template; 0 without."""
        size = len(self._turn)
        if not size or len(ids) < size:
            return 0
        found = (np.lib.stride_tricks.sliding_window_view(ids, size) == self._turn).all(axis=1).nonzero()[0]
        return int(found[-1]) + size if len(found) else 0

    def _copy(self, question: np.ndarray) -> np.ndarray:
        """The question's tokens where it is asked once more behind the prompt: its end, if it is long."""
        tokens = self._model.tokenise("\n\n" + self._model.say(question).strip(), plain=True)
        return tokens.ids.numpy()[-COPY:]

    def _encoding(self, request: Any, asked: Options) -> Plan | str:
        """The plan of a request that computes a chunk: its prompt is the encode prefix, the chunk's context, the chunk,
        and a token of no matter.
        """
        assert asked.encode is not None
        ids = np.asarray(request.prompt_token_ids, dtype=np.int64)
        library = self._libraries.of(asked.tenant, asked.method.encode)
        text = canonical(asked.encode["text"])
        context: list[Place] = []
        row = len(library.prefix_ids)
        for other in map(canonical, asked.encode.get("context", ())):
            length = len(self._model.tokenise(other, plain=True).ids)
            context.append(Place(other, library.key(other), ((row, 0, length),)))
            row += length
        mine = self._model.tokenise(text, plain=True).ids.numpy()
        if not np.array_equal(ids[row:-1], mine):
            return "the request's tokens are not those of the chunk that it says"
        encode = Encode(text, row, tuple(place.text for place in context))
        plan = Plan(
            request=request.request_id,
            ids=ids,
            tenant=asked.tenant,
            method=asked.method,
            ratio=0.0,
            prefix=len(library.prefix_ids),
            places=context,
            question=np.arange(0),
            question_ids=np.arange(0),
            encode=encode,
        )
        return self._exceeds(plan) or plan

    # ---- scheduling --------------------------------------------------------------------------------------------------

    def matched(self, request: Any, local: int) -> int | None:
        """How many tokens beyond ``local`` are filled by us if the request is scheduled now; None: not in this step."""
        plan = self.plans.get(request.request_id)
        if plan is None:
            return 0
        if plan.filled:  # it was preempted
            plan.filled = False
            self._load(plan)
        full = self._busy + plan.cost > self._most or self._tokens + len(plan.ids) > _HELD * self._most
        if self._loading.get(plan.request) or (self._busy and full):
            return None
        # A request that was preempted finds its own blocks in the prefix cache. It is filled again as a whole, so that
        # the same rows are chosen as the first time.
        start = min(local, self._shared(plan) // self._block * self._block)
        count = len(plan.ids) - 1
        if count <= local:
            return 0
        # What another request of this very step computes counts as cached, and is not there when blocks are filled.
        grown, plan.local = local > plan.local, local
        if grown:
            return None
        self._busy += max(1, plan.cost)
        self._tokens += len(plan.ids)
        plan.first = start
        return count - local

    def allocated(self, request: Any, blocks: Sequence[int], external: int) -> None:
        """The scheduler has given the request its ``blocks``, and expects ``external`` tokens from us."""
        if not external:
            return
        plan = self.plans[request.request_id]
        plan.blocks, plan.filled = list(blocks), True
        plan.spare = []
        if plan.copies_question and self.loan is not None:  # without, its end is asked, as far as the last block holds
            plan.spare = self.loan.take(-(-COPY // self._block))
        self.ready.append(plan)

    def bar(self, computed: Mapping[str, set[int]]) -> None:
        """Bar plans that share blocks with others that are computed, or filled, in this step itself. ``computed``: by
        request.
        """
        filled = {plan.request: set(plan.blocks[plan.first // self._block :]) for plan in self.ready}
        blocks = {**computed, **filled}
        for plan in self.ready:
            others = set[int]().union(*(mine for request, mine in blocks.items() if request != plan.request))
            plan.barred = not others.isdisjoint(plan.blocks[: plan.first // self._block])

    def end_of_step(self) -> tuple[list[Plan], list[Load], list[str]]:
        """What workers are to carry out, to load and to drop in this step; a new one begins."""
        step = self.ready, self.to_load, self.dropped
        self._at_workers |= {job.request for job in self.to_load}
        self._at_workers -= {plan.request for plan in self.ready}  # a worker that has filled blocks drops the chunks
        self.ready, self.to_load, self.dropped, self._busy, self._tokens = [], [], [], 0, 0
        return step

    def loaded(self, request: str, missing: Mapping[str, str]) -> None:
        """A worker has loaded a plan's chunks, except for those ``missing``, by key with the reason."""
        plan = self.plans.get(request)
        if plan is None or request not in self._loading:
            return
        self._loading[request] -= 1
        if missing:
            plan.places = [
                place if reason is None else dataclasses.replace(place, key=None, missing=reason)
                for place in plan.places
                for reason in [missing.get(place.key or "")]
            ]
            # A chunk is computed behind all of its context or not at all.
            lost = plan.encode is not None or not plan.keys
            if (reason := next(iter(missing.values())) if lost else self._too_much(plan)) is not None:
                self.reasons[request] = reason
                self.finished(request)

    def held(self) -> dict[str, int]:
        """How much is kept for requests, by kind."""
        return {
            "plans": len(self.plans),
            "reasons": len(self.reasons),
            "loading": len(self._loading),
            "sent": len(self._at_workers),
        }

    def close(self) -> None:
        """Save what is counted."""
        self._saving.shutdown()
        for known in self._known.values():
            known.save()

    def finished(self, request: str) -> None:
        """The request has ended, was aborted, or is served without reuse."""
        self.plans.pop(request, None)
        self._loading.pop(request, None)
        self.to_load = [job for job in self.to_load if job.request != request]
        if request in self._at_workers:
            self._at_workers.discard(request)
            self.dropped.append(request)


def _by_chunk(matches: Sequence[Match]) -> list[list[Match]]:
    """Neighbouring matches of one chunk at one shift are one chunk, of which a few tokens in between differ."""
    groups: list[list[Match]] = []
    for match in matches:
        last = groups[-1][-1] if groups else None
        if last is not None and last.name == match.name and last.row - last.offset == match.row - match.offset:
            groups[-1].append(match)
        else:
            groups.append([match])
    return groups
