"""Every name of vLLM's that is not its documented connector API, each in one function, for vLLM 0.32.

What this package needs from vLLM beyond `KVConnectorBase_V1` stands here and nowhere else, so that another version
fails in this file and by name (tests/vllm/test_seams.py holds all names against a version's source).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TESTED = ("0.32",)
"""The minor versions that the tests were run with."""


def version() -> str:
    import vllm

    return str(vllm.__version__)


def minor() -> str:
    return ".".join(version().split(".")[:2])


# ---- configuration ---------------------------------------------------------------------------------------------------


def tokenizer(model_config: Any) -> Any:
    """The model's tokenizer, as transformers loads it. Raises ValueError if vLLM was started without one."""
    from transformers import AutoTokenizer

    if model_config.skip_tokenizer_init:
        raise ValueError("chunks are told by their text: start vLLM without --skip-tokenizer-init")
    return AutoTokenizer.from_pretrained(
        model_config.tokenizer,
        revision=model_config.tokenizer_revision,
        trust_remote_code=model_config.trust_remote_code,
    )


def shape(vllm_config: Any) -> tuple[int, int, int]:
    """The model's layers, its KV heads over all ranks, and its head dimension."""
    model = vllm_config.model_config
    layers = model.get_num_layers(vllm_config.parallel_config)
    return layers, model.get_total_num_kv_heads(), model.get_head_size()


def weights_folder(model_config: Any) -> Path:
    """Where the model's weight files are: its folder, or the hub's snapshot in the local cache."""
    path = Path(model_config.model)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True))


def obstacle(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """Why no chunk can be reused with this configuration, or None."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups, parallel = kv_cache_config.kv_cache_groups, vllm_config.parallel_config
    if len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec:
        # Where all layers slide, rows outside the last window get the null block (single_type_kv_cache_manager.py:295).
        return (
            "its KV cache is not one group of full attention (recurrent layers, MLA, or sliding windows in all layers)"
        )
    if parallel.pipeline_parallel_size > 1:
        # A later stage has posted its receive for vLLM's own step before a connector is called (gpu_worker.py:1313).
        return "of pipeline parallelism: use tensor parallelism"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "of context parallelism: a rank holds some of a prompt's rows only"
    if parallel.data_parallel_size > 1 and vllm_config.model_config.is_moe:
        return "of experts spread over data-parallel ranks, which would wait for our passes"
    drafts = vllm_config.speculative_config
    if drafts is not None and drafts.method != "ngram":
        return (
            f"of speculative decoding by {drafts.method}: a draft model needs the prompt's KV as well; ngram does not"
        )
    if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
        return 'a failed reuse would fail the request: set "kv_load_failure_policy": "recompute"'
    return None


def block_size(kv_cache_config: Any) -> int:
    """Tokens of a KV cache block."""
    return int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)


def blocks_computed(scheduler_output: Any, kv_cache_manager: Any, size: int) -> dict[str, set[int]]:
    """By request, the blocks whose rows vLLM computes in this step, or has filled by us."""
    cached = scheduler_output.scheduled_cached_reqs
    begun = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    begun |= {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
    found = {}
    for request, count in scheduler_output.num_scheduled_tokens.items():
        (blocks,) = kv_cache_manager.get_block_ids(request)
        found[request] = set(blocks[begun[request] // size : -(-(begun[request] + count) // size)])
    return found


class Loan:
    """Blocks of the scheduler's pool that belong to no request, for the length of a step."""

    def __init__(self, kv_cache_manager: Any) -> None:
        self._pool = kv_cache_manager.block_pool
        self._lent: list[Any] = []

    def take(self, count: int) -> list[int]:
        """The ids of ``count`` blocks; none if there are not as many."""
        if self._pool.get_num_free_blocks() < count:
            return []
        blocks = self._pool.get_new_blocks(count)
        self._lent += blocks
        return [block.block_id for block in blocks]

    def end(self) -> None:
        """Give back what was taken."""
        if self._lent:
            self._pool.free_blocks(self._lent)
            self._lent = []


# ---- the scheduler's requests ----------------------------------------------------------------------------------------


def unsupported(request: Any, vllm_config: Any) -> str | None:
    """Why this request is served without reuse, or None."""
    if vllm_config.lora_config is not None:
        return "LoRA: adapters are mapped to the rows of vLLM's own step, so that no other rows can be computed"
    if request.sampling_params is None:
        return "a pooling request"
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "prompt embeddings"
    if request.mm_features:
        return "a multimodal prompt: its placeholders' KV is not a text's"
    if request.sampling_params.prompt_logprobs is not None:
        return "prompt_logprobs: they need every row's logits"
    if request.resumable:
        return "streaming input"
    if request.skip_reading_prefix_cache:
        return "skip_reading_prefix_cache: vLLM then takes no external KV"
    return None


def keep_private(request: Any, block: int, hash_size: int, size: int) -> None:
    """Give the request's blocks from ``block`` on hashes that nobody else can compute.

    vLLM's prefix cache then neither finds nor serves them, while the exact blocks before stay shared. The first hash is
    appended even if its block is not full yet: the answer fills it, and the next turn of a chat would find it.
    ``size``: tokens of a block; ``hash_size``: tokens of a hash.
    """
    first = block * (size // hash_size)
    del request.block_hashes[first:]
    request.block_hashes.append(os.urandom(32))
    request.update_block_hashes()


def salt(request: Any) -> str:
    """Only requests with the same one share KV in vLLM's prefix cache."""
    return request.cache_salt or ""


def idle(engine: Any) -> bool:
    """Whether the API server's engine has no request."""
    return not engine.output_processor.has_unfinished_requests()


# ---- the worker's model ----------------------------------------------------------------------------------------------


class Model:
    """The model that a worker has loaded: its attention layers in order, their KV caches, and forwards over them."""

    def __init__(self, module: nn.Module, vllm_config: Any, kv_cache_config: Any, device: torch.device) -> None:
        self.module, self.device = module, device
        self._config = vllm_config
        [group] = kv_cache_config.kv_cache_groups
        context = vllm_config.compilation_config.static_forward_context
        self.names: list[str] = [name for name in context if name in set(group.layer_names)]
        self.layers: list[Any] = [context[name] for name in self.names]
        self.block_size: int = group.kv_cache_spec.block_size
        self.dtype: torch.dtype = vllm_config.model_config.dtype
        # A builder of our own: a step's metadata lives in its builder's buffers until the step's forward has run. With
        # room for a virtual sequence per row (FlashInfer's buffers hold max_num_seqs, flashinfer.py:776).
        roomy = copy.copy(vllm_config)
        roomy.scheduler_config = copy.copy(vllm_config.scheduler_config)
        roomy.scheduler_config.max_num_seqs = vllm_config.scheduler_config.max_num_batched_tokens
        backend = self.layers[0].attn_backend
        self._builder = backend.get_builder_cls()(group.kv_cache_spec, self.names, roomy, device)

    @property
    def heads(self) -> list[tuple[int, int, int]]:
        """Each layer's query heads, KV heads (this rank's) and head dimension."""
        return [(layer.num_heads, layer.num_kv_heads, layer.head_size) for layer in self.layers]

    @property
    def scalings(self) -> list[float]:
        """Each layer's factor on query-key products."""
        return [float(layer.impl.scale) for layer in self.layers]

    @property
    def windows(self) -> list[int | None]:
        """Each layer's sliding window in tokens; None for full attention."""
        return [getattr(layer, "sliding_window", None) or None for layer in self.layers]

    def obstacle(self, kernel_blocks: Sequence[int]) -> str | None:
        """Why rows of our own cannot be computed with these layers, or None. ``kernel_blocks``: see that function."""
        if len({layer.attn_backend for layer in self.layers}) > 1:
            return "its layers have different attention backends"
        if any(size != self.block_size for size in kernel_blocks):
            return (
                f"its backend's blocks are not vLLM's ({self.block_size} tokens): set --block-size {kernel_blocks[0]}"
            )
        if any(layer.kv_sharing_target_layer_name is not None for layer in self.layers):
            return "its layers share KV"
        return None

    def rotary(self, layer: int) -> Any:
        """The rotary embedding that turns this layer's queries and keys. Raises AttributeError if there is none."""
        parent = self.module.get_submodule(self.names[layer].rsplit(".", 1)[0])
        return parent.rotary_emb

    def write(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write KV ``[n, Hk, D]`` to the paged cache's ``slots [n]`` (-1: nowhere), by the backend's own operation: in
        its layout, with its quantisation.
        """
        module = self.layers[layer]
        module.impl.do_kv_cache_update(module, keys, values, module.kv_cache, slots)

    def forward(
        self, ids: Tensor, positions: Tensor, lengths: Tensor, ends: Tensor, table: Tensor, slots: Tensor
    ) -> None:
        """Compute rows over the paged cache, as sequences of the query ``lengths [k]`` that end at ``ends [k]``.

        ``ids``, ``positions``, ``slots [S]`` int64; ``table [k, blocks]`` int32. Eager (hooks fire, any shape).
        """
        from vllm.forward_context import set_forward_context
        from vllm.v1.attention.backend import CommonAttentionMetadata

        starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=ends.to(torch.int32).to(self.device),
            num_reqs=len(lengths),
            num_actual_tokens=len(ids),
            max_query_len=int(lengths.max()),
            max_seq_len=int(ends.max()),
            block_table_tensor=table.to(self.device),
            slot_mapping=slots.to(self.device),
            causal=True,
            seq_lens_cpu_upper_bound=ends.to(torch.int32),
            is_prefilling=torch.ones(len(lengths), dtype=torch.bool),
        )
        metadata = self._builder.build(0, common)
        with set_forward_context(
            dict.fromkeys(self.names, metadata),
            self._config,
            num_tokens=len(ids),
            slot_mapping=dict.fromkeys(self.names, common.slot_mapping),
            skip_compiled=True,  # the Python forward, whatever the engine compiles
        ):
            self.module(input_ids=ids.to(self.device), positions=positions.to(self.device))

    @contextmanager
    def hooked(self, layers: Sequence[int], hook: Any) -> Iterator[None]:
        """In the block, ``hook(layer, query [S, H, D], key [S, Hk, D], value [S, Hk, D])`` is called before each of
        these layers attends; queries and keys are rotated.
        """
        handles = [self.layers[number].register_forward_pre_hook(self._adapter(number, hook)) for number in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _adapter(self, number: int, hook: Any) -> Any:
        layer = self.layers[number]

        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            query, key, value = args[:3]
            hook(
                number,
                query.view(-1, layer.num_heads, layer.head_size),
                key.view(-1, layer.num_kv_heads, layer.head_size),
                value.view(-1, layer.num_kv_heads, layer.head_size_v),
            )

        return before


def kernel_blocks(runner: Any) -> list[int]:
    """Tokens of the blocks that the attention backend sees, if the model runner says so."""
    return list(getattr(runner, "_kernel_block_sizes", None) or [])


def rotary_table(rotary: Any) -> tuple[Tensor, Tensor, bool]:
    """A rotary embedding's cos and sin, ``[positions, d/2]`` float32 as vLLM rounds them, and whether dimension i is
    paired with i + d/2 (else with its neighbour).
    """
    cos, sin = rotary.cos_sin_cache.float().chunk(2, dim=-1)
    return cos, sin, bool(rotary.is_neox_style)


# ---- threads ---------------------------------------------------------------------------------------------------------


def current_stream(device: torch.device) -> Any:
    """The stream that this thread computes on; None where there are no streams."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def same_stream(stream: Any) -> AbstractContextManager[Any]:
    """In the block, this thread computes on ``stream``, and on its device."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def rank() -> tuple[int, int]:
    """This process's tensor-parallel rank, and how many there are."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    return group.rank_in_group, group.world_size


def mean_over_ranks(scores: Tensor) -> Tensor:
    """The mean over the ranks, the same bits on all of them."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    return scores if group.world_size == 1 else group.broadcast(group.all_reduce(scores) / group.world_size)


def on_all_ranks(flags: Sequence[bool]) -> list[bool]:
    """Which of these flags are true on all ranks."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1 or not flags:
        return list(flags)
    counts = group.all_reduce(torch.tensor(flags, dtype=torch.float32, device=group.device))
    return [bool(count == group.world_size) for count in counts.tolist()]


def gather_heads(part: Tensor, heads: int) -> Tensor:
    """All ``heads`` of KV ``[L, Hk, n, D]`` whose heads are spread over the ranks (or repeated on several)."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return part
    every = group.all_gather(part.contiguous(), dim=1)
    return every[:, :: every.shape[1] // heads] if every.shape[1] > heads else every
