"""A LoRA adapter in training: on a copy of a model that shares its weights, with peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cacheclip_rag.errors import ConfigurationError, NotComposable
from cacheclip_rag.model.adapter import twin
from cacheclip_rag.model.backbone import Backbone

from .rows import Rows


class Lora:
    """A LoRA adapter of ``backbone``'s model, of this ``rank`` on all linear layers.

    The weights of ``backbone``, in float32, are shared and stay as they are. ``mixed``: multiply in bfloat16;
    ``attention``: the name of an attention implementation of transformers that takes a mask; ``checkpointing``: keep no
    activations inside layers, but compute them once more for the gradient (half the memory, the same numbers).

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
    ) -> None:
        if backbone.obstacle is not None:
            raise NotComposable(f"{backbone.obstacle}: its chunks cannot be composed, with trained weights neither")
        if any(window is not None for window in backbone.computer.windows):
            raise ConfigurationError("tune trains models with full attention in every layer, not sliding windows")
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ConfigurationError(f"training needs peft ({error}): pip install 'cacheclip-rag[train]'") from error
        self.backbone, self.mixed = backbone, mixed
        own = twin(backbone.model)
        own.set_attn_implementation(attention)
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(own, config)
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
        """Without gradients; ``untuned``: without the adapter, too."""
        self.model.eval()
        with torch.no_grad():
            if untuned:
                with self.model.disable_adapter():
                    yield
            else:
                yield

    def save(self, folder: Path) -> None:
        """Write the adapter in peft's format."""
        self.model.save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Take the weights of an adapter that `save` wrote."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"))
