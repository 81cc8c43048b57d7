"""A LoRA adapter and soft tokens in training: on a copy of a model that shares its weights, with peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cacheclip_rag.errors import ConfigurationError, NotComposable
from cacheclip_rag.model.adapter import twin
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.model.soft import SoftVectors, read_vectors, with_vectors
from cacheclip_rag.prompt import SoftTokens
from cacheclip_rag.prompt.soft import SoftKind

from .rows import Rows


@dataclass(frozen=True)
class Soft:
    """Soft tokens to be trained: so many ``before`` and ``behind`` each chunk, of this ``kind``."""

    kind: SoftKind
    before: int
    behind: int

    @property
    def tokens(self) -> SoftTokens:
        return SoftTokens.of(self.before, self.behind, stored=self.kind == "packet")


class Lora:
    """What is trained of ``backbone``'s model: a LoRA adapter of this ``rank`` on all linear layers, none for 0, and
    ``soft`` tokens, if any.

    The weights of ``backbone``, in float32, are shared and stay as they are. ``mixed``: multiply in bfloat16;
    ``attention``: the name of an attention implementation of transformers that takes a mask; ``checkpointing``: keep no
    activations inside layers, but compute them once more for the gradient (half the memory, the same numbers). Soft
    tokens begin as normal random numbers of a standard deviation of 0.02, as in KV Packet's code.

    Raises `NotComposable` for a model whose chunks cannot be composed, `ConfigurationError` without peft, and for a
    model with sliding windows, which the mask does not have.
    """

    def __init__(
        self,
        backbone: Backbone,
        rank: int,
        seed: int = 0,
        mixed: bool = False,
        attention: str = "sdpa",
        checkpointing: bool = False,
        soft: Soft | None = None,
    ) -> None:
        if backbone.obstacle is not None:
            raise NotComposable(f"{backbone.obstacle}: its chunks cannot be composed, with trained weights neither")
        if any(window is not None for window in backbone.computer.windows):
            raise ConfigurationError("tune trains models with full attention in every layer, not sliding windows")
        self.backbone, self.mixed, self.rank, self.soft = backbone, mixed, rank, soft
        own = twin(backbone.model)
        own.set_attn_implementation(attention)
        torch.manual_seed(seed)
        self.model: Any = _adapted(own, rank) if rank else own.requires_grad_(False)
        if soft is not None:
            width = own.get_input_embeddings().weight.shape[1]
            vectors = 0.02 * torch.randn(soft.before + soft.behind, width)
            self._vectors = with_vectors(own, vectors.to(backbone.device)).vectors
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def logits(self, rows: Rows, count: int, **options: Any) -> Tensor:
        """The logits ``[count, V]`` float32 of the last ``count`` rows. ``options`` go to the attention function."""
        device = self.backbone.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.mixed):
            output = self.model(
                input_ids=rows.ids[None].to(device),
                position_ids=rows.positions[None].to(device),
                attention_mask=None if rows.mask is None else rows.mask[None, None].to(device),
                use_cache=False,
                logits_to_keep=count,
                **options,
            )
        return output.logits[0].float()

    @contextmanager
    def looking(self, untuned: bool = False) -> Iterator[None]:
        """Without gradients; ``untuned``: without the adapter, too. Rows decide whether there are soft tokens."""
        self.model.eval()
        with torch.no_grad(), self.model.disable_adapter() if untuned and self.rank else nullcontext():
            yield

    def save(self, folder: Path) -> None:
        """Write the adapter in peft's format, and the soft tokens."""
        if self.rank:
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        if self.soft is not None:
            before, behind = self._vectors.detach().split([self.soft.before, self.soft.behind])
            SoftVectors(self.soft.kind, before, behind).save(folder)

    def load(self, folder: Path) -> None:
        """Take what `save` wrote."""
        if self.rank:
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"))
        if self.soft is not None:
            found = read_vectors(folder, self._vectors.shape[1])
            assert found is not None
            with torch.no_grad():
                self._vectors.copy_(torch.cat([found.before, found.behind]))


def _adapted(model: PreTrainedModel, rank: int) -> Any:
    """The model with a new LoRA adapter. Raises `ConfigurationError` without peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigurationError(f"training needs peft ({error}): pip install 'cacheclip-rag[train]'") from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)
