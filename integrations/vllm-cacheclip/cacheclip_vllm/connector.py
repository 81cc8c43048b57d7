"""The KV connector: vLLM calls it in the scheduler and in the workers; it hands on to the planner and the filler."""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from cacheclip_rag.chunks import ChunkKV
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.kv.library import Library
from cacheclip_rag.store import NotWorthLoading

from . import PROOF, seams
from .auxiliary import WorkerAuxiliary
from .filling import Filler
from .libraries import Libraries
from .metrics import ReuseMetrics, ReuseStats
from .plan import FIELD, Done, Load, Plan
from .planner import Planner
from .served import ServedModel
from .settings import Settings, settings
from .trial import tried

log = logging.getLogger("cacheclip_rag")

_GONE = "its stored KV is gone or damaged"
_UNFILLED = "its beginning is computed in this very step, by another request"
_IDLE = 0.01
"""Seconds that a step without rows waits for chunks that are being loaded, so that the scheduler does not spin."""


@dataclass
class Work(KVConnectorMetadata):
    """From the scheduler to the workers, with each step: what to load, to fill and to drop."""

    load: list[Load]
    plans: list[Plan]
    dropped: list[str]
    idle: bool


@dataclass
class Results(KVConnectorWorkerMetadata):
    """From a worker to the scheduler: for which request chunks were loaded, by key why some were not, and what became
    of plans.
    """

    loaded: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    done: dict[str, Done] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, Results)
        done = dict(self.done)
        for request, result in other.done.items():
            if request not in done or result.failed:
                done[request] = result
        return Results(self.loaded + other.loaded, done)


class CacheClipConnector(KVConnectorBase_V1):
    """Reuses stored chunk KV at any position of a prompt, and recomputes the rows that a method selects.

    To the scheduler, all rows of such a prompt but the last are external; before the step's forward, the worker has
    filled their blocks. The last row, sampling and decoding are vLLM's own.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = settings(vllm_config)
        self._obstacle = _obstacle(vllm_config, kv_cache_config, self._settings)
        self._asked: set[str] = set()
        self._most = vllm_config.scheduler_config.max_num_batched_tokens
        self._planner: Planner | None = None
        self._filler: Filler | None = None
        if self._obstacle:
            if role == KVConnectorRole.SCHEDULER:
                log.warning("cacheclip: no chunk is reused, because %s", self._obstacle)
            return
        self._in_scheduler = role == KVConnectorRole.SCHEDULER
        self._libraries = Libraries(ServedModel(vllm_config), self._settings, in_memory=not self._in_scheduler)
        if self._in_scheduler:
            self._block = block = seams.block_size(kv_cache_config)
            self._planner = Planner(
                self._libraries,
                self._settings.default,
                block=block,
                hashed=kv_cache_config.hash_block_size or block,
                most=self._most,
                ranks=vllm_config.parallel_config.tensor_parallel_size,
                auxiliary=self._settings.auxiliary is not None,
            )
            self._caching = bool(vllm_config.cache_config.enable_prefix_caching)
            self._reports: dict[str, Done] = {}
            self._unfinished: dict[str, dict[str, Any]] = {}
            """Reports that were handed out in this step, of requests whose results come behind their end."""
            self._counts = ReuseStats()
        else:
            self._block = seams.block_size(kv_cache_config)
            self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="cacheclip-load")
            self._loads: dict[str, Future[dict[str, ChunkKV | str]]] = {}
            self._wanted: dict[str, Load] = {}
            self._chunks: dict[str, dict[str, ChunkKV]] = {}
            self._results = Results()
            self._invalid: set[int] = set()
            self._failed: set[int] = set()
            """Blocks that failed to be filled in the step before: vLLM computes them at the earliest in this one."""
            self._auxiliary: WorkerAuxiliary | None = None
            self._untried = "the model was not tried: start vLLM with --worker-cls cacheclip_vllm.worker.Worker"

    # ---- in the scheduler --------------------------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        self._manager = kv_cache_manager
        if self._planner is not None:
            self._planner.loan = seams.Loan(kv_cache_manager)

    def on_new_request(self, request: Any) -> None:
        given = (request.kv_transfer_params or {}).get(FIELD)
        if isinstance(given, dict):
            given = dict(given)
            proof, said = os.environ.get(PROOF, ""), str(given.pop("proof", ""))
            if not proof or not hmac.compare_digest(
                said.encode(), proof.encode()
            ):  # from a client, who may not say these
                given.pop("tenant", None)
                given.pop("encode", None)
            if given.get("report"):
                self._asked.add(request.request_id)
        if self._planner is None:
            return
        if (reason := seams.unsupported(request, self._vllm_config)) is not None:
            self._planner.reasons[request.request_id] = reason
            return
        self._planner.add(request, given, self._caching)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return (0 if self._planner is None else self._planner.matched(request, num_computed_tokens)), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._planner is not None:
            (mine,) = blocks.get_block_ids()
            self._planner.allocated(request, mine, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        if self._planner is None:
            return Work([], [], [], idle=False)
        self._unfinished.clear()
        if self._planner.ready:
            self._planner.bar(seams.blocks_computed(scheduler_output, self._manager, self._block))
        plans, load, dropped = self._planner.end_of_step()
        return Work(load, plans, dropped, scheduler_output.total_num_scheduled_tokens == 0)

    def update_connector_output(self, connector_output: Any) -> None:
        results = connector_output.kv_connector_worker_meta
        if self._planner is None:
            return
        if self._planner.loan is not None:
            self._planner.loan.end()
        if results is None:
            return
        for request, missing in results.loaded:
            self._planner.loaded(request, missing)
        for request, done in results.done.items():
            self._counts.done(done)
            if request in self._unfinished:
                self._unfinished[request].update(done.report)
            elif request in self._asked:
                self._reports[request] = done

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        name = request.request_id
        asked = name in self._asked
        self._asked.discard(name)
        if self._planner is None:
            return False, {FIELD: {"fallbacks": [self._obstacle]}} if asked else None
        self._planner.finished(name)
        reason, done = self._planner.reasons.pop(name, None), self._reports.pop(name, None)
        if reason:
            self._counts.left(reason)
        if not asked:
            return False, None
        report: dict[str, Any] = {} if done is None else dict(done.report)
        if reason or (done is not None and done.failed):
            report["fallbacks"] = [reason or (done.failed if done is not None else None)]
        if done is None and not reason:
            # It ends in the step that filled its blocks: vLLM ends requests before it hands on that step's results, and
            # sends what both have said.
            self._unfinished[name] = report
        return False, {FIELD: report}

    def shutdown(self) -> None:
        if self._planner is not None:
            self._planner.close()

    def held(self) -> dict[str, int]:
        """How much is kept for requests, by kind: nothing once they have ended."""
        if self._planner is not None:
            return {**self._planner.held(), "reports": len(self._reports), "asked": len(self._asked)}
        return {} if self._obstacle else {"loads": len(self._loads), "chunks": len(self._chunks)}

    def get_kv_connector_stats(self) -> ReuseStats | None:
        if self._planner is None:
            return None
        counts, self._counts = self._counts, ReuseStats()
        return counts

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ReuseStats:
        return ReuseStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> ReuseMetrics:
        return ReuseMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- in a worker -------------------------------------------------------------------------------------------------

    def attach(self, module: torch.nn.Module, device: torch.device, kernel_blocks: Sequence[int] = ()) -> None:
        """The worker's loaded model. It is tried on a few tokens before any request comes."""
        if self._obstacle:
            return
        model = seams.Model(module, self._vllm_config, self._kv_cache_config, device)
        if self._settings.auxiliary is not None:
            self._auxiliary = WorkerAuxiliary(self._settings.auxiliary, self._libraries)
        filler = Filler(model, self._libraries, self._most, self._auxiliary)
        if (reason := model.obstacle(kernel_blocks) or tried(filler)) is not None:
            said = f"the chunks of this model cannot be moved and joined inside vLLM: {reason}"
            if self._settings.unsupported != "plain":
                raise ConfigurationError(f'{said} (to serve it without reuse, set "unsupported": "plain")')
            self._untried = said
            return
        self._filler = filler

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        work = self._get_connector_metadata()
        assert isinstance(work, Work)
        if self._obstacle:
            return
        for request in work.dropped:
            for kept in (self._loads, self._wanted, self._chunks):
                kept.pop(request, None)
        for job in work.load:
            library = self._libraries.of(job.tenant, job.encoder)
            self._wanted[job.request] = job
            self._loads[job.request] = self._threads.submit(_load, library, job.keys, job.tenant, self._auxiliary)
        if work.plans:
            self._fill(work.plans)
        self._failed = set(self._invalid)
        if work.idle and self._loads:
            wait(self._loads.values(), timeout=_IDLE, return_when="FIRST_COMPLETED")
        for request in [request for request, future in self._loads.items() if future.done()]:
            future, wanted = self._loads.pop(request), self._wanted.pop(request)
            found = dict.fromkeys(wanted.keys, _GONE) if future.exception() is not None else future.result()
            self._chunks[request] = {key: chunk for key, chunk in found.items() if isinstance(chunk, ChunkKV)}
            missing = {key: reason for key, reason in found.items() if isinstance(reason, str)}
            self._results.loaded.append((request, missing))

    def _fill(self, plans: list[Plan]) -> None:
        lost = [plan.barred or not self._failed.isdisjoint(plan.blocks[: plan.first // self._block]) for plan in plans]
        done = [Done(failed=_UNFILLED if gone else self._untried) for gone in lost]
        able = [number for number, gone in enumerate(lost) if not gone]
        try:
            if self._filler is not None and able:
                for number, result in zip(able, self._filler.fill([plans[n] for n in able], self._chunks), strict=True):
                    done[number] = result
        except Exception as error:  # vLLM computes them ("recompute"), as it does where one plan fails
            if seams.rank()[1] > 1:  # the other ranks wait in a collective: better no engine than one that hangs
                raise
            log.exception("cacheclip: reuse failed for the requests of a step")
            done = [Done(failed=repr(error)) for _ in plans]
        for plan, result in zip(plans, done, strict=True):
            self._chunks.pop(plan.request, None)  # not for as long as it decodes; a preempted one loads them again
            if plan.encode is not None and self._auxiliary is not None:
                self._threads.submit(self._auxiliary.prepare, plan.tenant, [plan.encode.text])
            if result.failed:
                self._invalid.update(plan.blocks[plan.first // self._block :])
            self._results.done[plan.request] = result

    def get_block_ids_with_load_errors(self) -> set[int]:
        invalid: set[int] = set()
        if not self._obstacle:
            invalid, self._invalid = self._invalid, invalid
        return invalid

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        if self._obstacle or not (self._results.loaded or self._results.done):
            return None
        results, self._results = self._results, Results()
        return results

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: blocks are filled before the forward."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to save: chunks are kept where they are encoded."""

    def wait_for_save(self) -> None:
        """Nothing to wait for."""


def _load(
    library: Library, keys: Mapping[str, int | None], tenant: str, auxiliary: WorkerAuxiliary | None
) -> dict[str, ChunkKV | str]:
    """The stored chunks with these keys, or why one is not there; ``keys`` as in `Load`. An auxiliary model has its own
    of them then.
    """
    library.store.refresh()  # what another process forgot is not served from memory
    found: dict[str, ChunkKV | str] = {}
    for key, tokens in keys.items():
        try:
            chunk = library.get(key, tokens)
        except NotWorthLoading as reason:
            found[key] = str(reason)
        else:
            found[key] = _GONE if chunk is None else chunk
    if auxiliary is not None:
        auxiliary.prepare(tenant, [chunk.text for chunk in found.values() if not isinstance(chunk, str)])
    return found


def _obstacle(vllm_config: Any, kv_cache_config: Any, chosen: Settings) -> str | None:
    """Why nothing is reused, where that is to be served. Raises `ConfigurationError` where it is to be refused."""
    if seams.minor() not in seams.TESTED:
        said = f"it was tested with vLLM {', '.join(seams.TESTED)} and this is {seams.version()}"
        if chosen.untested != "plain":
            raise ConfigurationError(f'{said}: install that, or set "untested": "plain" to serve without reuse')
        return said
    reason = seams.obstacle(vllm_config, kv_cache_config)
    if reason is not None and chosen.unsupported != "plain":
        raise ConfigurationError(
            f'no chunk can be reused, because {reason} ("unsupported": "plain" serves without reuse)'
        )
    return reason
