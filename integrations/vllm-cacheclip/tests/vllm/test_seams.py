"""What this package uses of vLLM exists in the installed version, and in the next one, so that a change fails by name.

One table holds all names. Those of the installed version are looked up by introspection and in its sources, those of
the next in its wheel's sources, without installing it.
"""

from __future__ import annotations

import importlib
import inspect
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import pytest
import sources
import vllm
from cacheclip_vllm import seams
from cacheclip_vllm.connector import CacheClipConnector, Results
from cacheclip_vllm.metrics import ReuseMetrics, ReuseStats
from cacheclip_vllm.worker import Worker
from sources import Missing

INSTALLED = Path(vllm.__file__).parents[1]
NEXT = "0.33.0"

READ = """
:__version__
config.model:ModelConfig.skip_tokenizer_init tokenizer tokenizer_revision trust_remote_code model revision dtype is_moe
config.model:ModelConfig.hf_text_config hf_config quantization max_model_len
config.vllm:VllmConfig.model_config parallel_config kv_transfer_config cache_config scheduler_config compilation_config
config.parallel:ParallelConfig.pipeline_parallel_size tensor_parallel_size data_parallel_size
config.parallel:ParallelConfig.decode_context_parallel_size prefill_context_parallel_size
config.kv_transfer:KVTransferConfig.kv_load_failure_policy kv_connector_extra_config
config.scheduler:SchedulerConfig.max_num_seqs max_num_batched_tokens
config.cache:CacheConfig.enable_prefix_caching cache_dtype
config.compilation:CompilationConfig.static_forward_context
v1.kv_cache_interface:FullAttentionSpec
v1.kv_cache_interface:KVCacheSpec.block_size
v1.kv_cache_interface:KVCacheConfig.kv_cache_groups hash_block_size
v1.kv_cache_interface:KVCacheGroupSpec.kv_cache_spec layer_names
v1.core.kv_cache_manager:KVCacheManager.block_pool
v1.core.kv_cache_utils:KVCacheBlock.block_id
v1.core.sched.output:SchedulerOutput.total_num_scheduled_tokens
v1.request:Request.request_id sampling_params prompt_token_ids prompt_embeds mm_features lora_request resumable
v1.request:Request.kv_transfer_params block_hashes cache_salt
sampling_params:SamplingParams.prompt_logprobs
model_executor.layers.attention.attention:Attention.attn_backend impl num_heads num_kv_heads head_size head_size_v
model_executor.layers.attention.attention:Attention.sliding_window kv_cache
v1.attention.backend:AttentionImplBase.scale
model_executor.layers.rotary_embedding.base:RotaryEmbeddingBase.cos_sin_cache is_neox_style
distributed.parallel_state:GroupCoordinator.rank_in_group world_size
distributed.kv_transfer.kv_connector.v1.base:KVConnectorMetadata
distributed.kv_transfer.kv_connector.v1.base:KVConnectorRole.SCHEDULER
distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1._vllm_config _kv_cache_config
v1.outputs:KVConnectorOutput.kv_connector_worker_meta
distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorStats.data
distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorPromMetrics._counter_cls per_engine_labelvalues
platforms:current_platform
v1.worker.cpu_worker:CPUWorker
v1.worker.worker_base:WorkerBase.model_runner device
"""
"""Modules below ``vllm``, and what is read there; several attributes of one class stand in one line."""

CALLED = """
config.model:ModelConfig.get_num_layers(parallel_config)
config.model:ModelConfig.get_total_num_kv_heads()
config.model:ModelConfig.get_head_size()
v1.core.block_pool:BlockPool.get_new_blocks(num_blocks)
v1.core.kv_cache_manager:KVCacheBlocks.get_block_ids()
v1.request:Request.update_block_hashes()
v1.attention.backend:AttentionBackend.get_builder_cls()
v1.attention.backend:AttentionMetadataBuilder.__init__(kv_cache_spec, layer_names, vllm_config, device)
v1.attention.backend:AttentionMetadataBuilder.build(common_prefix_len, common_attn_metadata)
v1.attention.backend:CommonAttentionMetadata(query_start_loc=, query_start_loc_cpu=, seq_lens=, num_reqs=, \
num_actual_tokens=, max_query_len=, max_seq_len=, block_table_tensor=, slot_mapping=, causal=, \
seq_lens_cpu_upper_bound=, is_prefilling=)
forward_context:set_forward_context(attn_metadata, vllm_config, num_tokens=, slot_mapping=, skip_compiled=)
distributed.parallel_state:get_tp_group()
distributed.parallel_state:GroupCoordinator.all_reduce(input_)
distributed.parallel_state:GroupCoordinator.broadcast(input_)
distributed.parallel_state:GroupCoordinator.all_gather(input_, dim=)
distributed.kv_transfer.kv_transfer_state:get_kv_transfer_group()
distributed.kv_transfer.kv_transfer_state:has_kv_transfer_group()
distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.register_connector(name, module_path, class_name)
distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.__init__(vllm_config, role, kv_cache_config)
distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1._get_connector_metadata()
distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorStats(data=)
distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorPromMetrics.__init__(vllm_config, metric_types, labelnames, \
per_engine_labelvalues)
platforms.interface:Platform.is_cpu()
v1.worker.gpu_worker:Worker.initialize_from_config(kv_cache_config)
v1.worker.gpu_model_runner:GPUModelRunner.get_model()
v1.worker.gpu.model_runner:GPUModelRunner.get_model()
v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
v1.attention.backends.flash_attn:FlashAttentionImpl.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
v1.attention.backends.flashinfer:FlashInferImpl.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
v1.attention.backends.triton_attn:TritonAttentionImpl.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
""".replace("\\\n", "")
"""What is called, and what with; a name with ``=`` is passed as a keyword. No other parameter may be required."""

CONNECTOR = "distributed.kv_transfer.kv_connector.v1.base"
METRICS = "distributed.kv_transfer.kv_connector.v1.metrics"
OVERRIDDEN: list[tuple[str, str, type]] = [
    *(
        (CONNECTOR, f"KVConnectorBase_V1.{name}", CacheClipConnector)
        for name in (
            "bind_kv_cache_manager",
            "on_new_request",
            "get_num_new_matched_tokens",
            "update_state_after_alloc",
            "build_connector_meta",
            "update_connector_output",
            "request_finished",
            "start_load_kv",
            "get_block_ids_with_load_errors",
            "build_connector_worker_meta",
            "wait_for_layer_load",
            "save_kv_layer",
            "wait_for_save",
            "shutdown",
            "get_kv_connector_stats",
            "build_kv_connector_stats",
            "build_prom_metrics",
        )
    ),
    (CONNECTOR, "KVConnectorWorkerMetadata.aggregate", Results),
    *((METRICS, f"KVConnectorStats.{name}", ReuseStats) for name in ("reset", "aggregate", "reduce", "is_empty")),
    (METRICS, "KVConnectorPromMetrics.observe", ReuseMetrics),
    ("v1.worker.gpu_worker", "Worker.initialize_from_config", Worker),
]
"""What vLLM calls: our method has its parameters, by name and in their order."""

NEEDS_A_GPU = ("flash_attn", "flashinfer", "triton_attn")
"""Modules that cannot be imported everywhere; they are looked up in the sources only."""


def read() -> list[tuple[str, str]]:
    rows = []
    for line in READ.split("\n")[1:-1]:
        module, names = line.split(":")
        first, *others = names.split()
        owner = first.rpartition(".")[0]
        rows += [(module, first), *((module, f"{owner}.{name}") for name in others)]
    return rows


def called() -> list[tuple[str, str, list[str]]]:
    rows = []
    for line in CALLED.split("\n")[1:-1]:
        module, call = line.split(":")
        path, passed = call[:-1].split("(")
        rows.append((module, path, [name for name in passed.split(", ") if name]))
    return rows


# ---- two ways to look a name up --------------------------------------------------------------------------------------


def introspected(module: str, path: str) -> Signature | None:
    """The signature of an imported vLLM's name, None for what is no function or class. Raises `Missing`."""
    try:
        found: Any = importlib.import_module(f"vllm.{module}".rstrip("."))
    except ModuleNotFoundError as error:
        raise Missing(str(error)) from error
    owner = None
    for name in path.split("."):
        owner, found = found, getattr(found, name, Missing)
    if found is Missing and inspect.isclass(owner):
        name = path.rpartition(".")[2]
        declared = any(name in getattr(kind, "__annotations__", {}) for kind in owner.__mro__)
        if declared or any(_assigns(kind, name) for kind in owner.__mro__ if kind.__module__.startswith("vllm")):
            return None
    if found is Missing:
        raise Missing(f"no {name} in vllm.{module} (of {path})")
    static = inspect.isclass(owner) and isinstance(inspect.getattr_static(owner, name), staticmethod | classmethod)
    if not callable(found):
        return None
    made = inspect.signature(found)
    bound = inspect.isclass(owner) and not inspect.isclass(found) and not static
    return made.replace(parameters=list(made.parameters.values())[1:]) if bound else made


def _assigns(kind: type, name: str) -> bool:
    return f"self.{name} " in inspect.getsource(kind) or f"self.{name}:" in inspect.getsource(kind)


def in_sources(folder: Path, module: str, path: str) -> Signature | None:
    """The same, read from source files."""
    made = sources.signature(folder, module, path)
    parameters = [] if made is None else list(made.parameters.values())
    if parameters and parameters[0].name in ("self", "cls"):
        del parameters[0]
    return None if made is None else Signature(parameters)


def callable_with(made: Signature, passed: list[str]) -> str | None:
    """Why a function cannot be called so, or None."""
    every = made.parameters
    first = [name for name in passed if not name.endswith("=")]
    expected = [name for name, one in every.items() if one.kind is Parameter.POSITIONAL_OR_KEYWORD]
    if first != expected[: len(first)]:
        return f"its first parameters are {expected[: len(first)]}, not {first}"
    names = {name.removesuffix("=") for name in passed}
    if unknown := names - set(every):
        return f"it has no {sorted(unknown)}"
    required = {
        name
        for name, one in every.items()
        if one.default is Parameter.empty and one.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    }
    return f"it requires {sorted(required - names)}, too" if required - names else None


def overridden_by(theirs: Signature, ours: Any) -> str | None:
    """Why our method cannot stand for vLLM's, or None."""
    mine = list(inspect.signature(ours).parameters)[not inspect.ismethod(ours) :]  # a class method is bound
    return None if list(theirs.parameters) == mine else f"its parameters are {list(theirs.parameters)}, ours {mine}"


def check_call(made: Signature | None, passed: list[str]) -> None:
    assert made is not None, "it is not a function or class"
    assert (reason := callable_with(made, passed)) is None, reason


# ---- the installed version -------------------------------------------------------------------------------------------


def test_the_installed_version_is_a_tested_one() -> None:
    assert seams.minor() in seams.TESTED


@pytest.mark.parametrize(("module", "path"), read())
def test_installed_has(module: str, path: str) -> None:
    introspected(module, path)
    in_sources(INSTALLED, module, path)


@pytest.mark.parametrize(("module", "path", "passed"), called())
def test_installed_can_be_called(module: str, path: str, passed: list[str]) -> None:
    if not module.endswith(NEEDS_A_GPU):
        check_call(introspected(module, path), passed)
    check_call(in_sources(INSTALLED, module, path), passed)


@pytest.mark.parametrize(("module", "path", "ours"), OVERRIDDEN)
def test_installed_calls_ours(module: str, path: str, ours: type) -> None:
    for theirs in (introspected(module, path), in_sources(INSTALLED, module, path)):
        assert theirs is not None
        assert (reason := overridden_by(theirs, getattr(ours, path.split(".")[1]))) is None, reason


def test_nothing_of_the_connector_is_left_out_of_the_table() -> None:
    base = importlib.import_module(f"vllm.{CONNECTOR}").KVConnectorBase_V1
    ours = {name for name in vars(CacheClipConnector) if hasattr(base, name) and not name.startswith("_")}
    assert ours == {path.split(".")[1] for _, path, owner in OVERRIDDEN if owner is CacheClipConnector}


# ---- the next version ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def following() -> Path:
    try:
        return sources.sources_of(NEXT)
    except OSError as error:
        pytest.skip(f"vLLM {NEXT} was not looked at: {error}")


@pytest.mark.parametrize(("module", "path"), read())
def test_next_has(following: Path, module: str, path: str) -> None:
    in_sources(following, module, path)


@pytest.mark.parametrize(("module", "path", "passed"), called())
def test_next_can_be_called(following: Path, module: str, path: str, passed: list[str]) -> None:
    check_call(in_sources(following, module, path), passed)


@pytest.mark.parametrize(("module", "path", "ours"), OVERRIDDEN)
def test_next_calls_ours(following: Path, module: str, path: str, ours: type) -> None:
    theirs = in_sources(following, module, path)
    assert theirs is not None
    assert (reason := overridden_by(theirs, getattr(ours, path.split(".")[1]))) is None, reason


# ---- the tests themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "passed", "message"),
    [
        ("Request.block_hash", None, "no block_hash in vllm.v1.request"),
        ("Requests", None, "no Requests in vllm.v1.request"),
        ("Request", ["request_id"], "requires"),
        ("Request", ["prompt_token_ids", "request_id"], "first parameters"),
        ("Request.update_block_hashes", ["now="], "has no"),
    ],
)
def test_a_change_fails_by_name(path: str, passed: list[str] | None, message: str) -> None:
    for look in (introspected, lambda module, path: in_sources(INSTALLED, module, path)):
        with pytest.raises((Missing, AssertionError), match=message):
            check_call(look("v1.request", path), passed or [])
