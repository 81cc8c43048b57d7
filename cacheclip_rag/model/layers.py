"""A model of transformers as layers over a canvas: all of them, some of them, in one go or in stages."""

from __future__ import annotations

import copy
import inspect
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigurationError, NotComposable
from .attention import AUTO, IMPLEMENTATIONS, Enough, Shape, Sparse, choose
from .attention.mask import Probe
from .canvas import Canvas
from .tokenizer import Texts


class Layers(Texts):
    """The forward of a causal language model of transformers, with its tokenizer.

    Thread-safe in use: a forward keeps its state in its own `Canvas`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, attention: str = AUTO) -> None:
        super().__init__(tokenizer)
        self.model = model.eval()
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.config = model.config.get_text_config()
        self.layers: int = self.config.num_hidden_layers
        self.kv_heads: int = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        self.head_dim: int = (
            getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        )
        self.attention = choose(attention, self.device, self.dtype, self.head_dim)
        self.window: int = int(getattr(self.config, "max_position_embeddings", 0) or 2**31)
        self._views: dict[tuple[int, int, bool], nn.Module] = {}
        self._head_views: dict[int, nn.Module] = {}

    # ---- what the layers are --------------------------------------------------------------------------------------

    def inverse_frequencies(self) -> Tensor:
        """``[L, d/2]`` (or ``[1, d/2]`` when all layers share it), read from the model's own rotary module."""
        module = self.model.base_model.rotary_emb
        if hasattr(module, "inv_freq"):
            return module.inv_freq[None]
        return torch.stack([getattr(module, f"{kind}_inv_freq") for kind in self.config.layer_types])

    @cached_property
    def windows(self) -> list[int | None]:
        """Each layer's sliding window as the configuration has it, in tokens; None for one that attends to everything
        that fits into the model's own window.
        """
        window = getattr(self.config, "sliding_window", None)
        if window is not None and window >= self.window:
            window = None
        types = getattr(self.config, "layer_types", None) or ["sliding_attention"] * self.layers
        return [window if kind == "sliding_attention" else None for kind in types]

    @property
    def full_layers(self) -> list[int]:
        """The layers that attend to the whole context; all of them where every layer has a sliding window."""
        return [layer for layer, window in enumerate(self.windows) if window is None] or list(range(self.layers))

    @property
    def sliding_window(self) -> int | None:
        """How far the `full_layers` see, in tokens; None for everything. Only where every layer has a window."""
        return None if None in self.windows else self.windows[0]

    # ---- forward --------------------------------------------------------------------------------------------------

    def canvas(self, capacity: int, layers: int | None = None) -> Canvas:
        """An empty canvas; of fewer ``layers`` for a forward that does not go deeper."""
        return Canvas(
            layers or self.layers, self.kv_heads, self.head_dim, capacity, dtype=self.dtype, device=self.device
        )

    @torch.inference_mode()
    def forward(
        self,
        x: Tensor,
        rows: Tensor,
        canvas: Canvas,
        *,
        positions: Tensor | None = None,
        logits: int = 1,
        probe: Probe | None = None,
        shape: Shape | None = None,
        floors: Tensor | None = None,
        first: int = 0,
        depth: int | None = None,
    ) -> Tensor | None:
        """Compute the tokens ``x [S]`` at canvas ``rows [S]`` (strictly increasing); their KV is written before it is
        attended to.

        This one primitive is full prefill (all rows on an empty canvas), selective recompute (scattered rows over
        placed chunks) and a decoding step (one row). Returns the last ``logits`` rows' logits ``[logits, vocabulary]``
        in float32, or None for ``logits=0``, which spares the language-model head, and for a probe that had `Enough`.
        ``depth`` runs the first layers only (no logits). ``first``: start at this layer, from the residual stream
        ``x [S, d]`` that `advance` returned. ``positions [S]`` are the RoPE positions where they differ from the slots;
        ``floors [S]`` the first slots that the rows may see, where several texts share the canvas; ``shape`` changes
        how rows weigh what they see.
        Source: the sparse prefill of CacheBlend and EPIC, with the exact causal mask.
        """
        kwargs = self._inputs(x, rows, canvas, positions, probe, shape, floors)
        try:
            if logits and depth is None:
                output = self._head_view(first)(**kwargs, logits_to_keep=logits)
                return output.logits[0].float()
            self._view(first, depth or self.layers)(**kwargs)
        except Enough:
            pass
        return None

    @torch.inference_mode()
    def advance(
        self,
        x: Tensor,
        rows: Tensor,
        canvas: Canvas,
        first: int,
        last: int,
        *,
        positions: Tensor | None = None,
        probe: Probe | None = None,
        shape: Shape | None = None,
        floors: Tensor | None = None,
    ) -> Tensor:
        """The layers ``[first, last)`` only: returns the residual stream ``[S, d]`` that enters layer ``last``.

        ``x`` is ``ids [S]`` for ``first=0``, else the residual stream entering layer ``first``; other arguments as in
        `forward`. Methods that change their rows half way through the model (DroidSpeak) go in such stages. Raises
        `NotComposable` for a model that cannot.
        """
        if not self._stages:
            raise NotComposable(f"{self.config.model_type} does something to its input that stages would repeat")
        kwargs = self._inputs(x, rows, canvas, positions, probe, shape, floors)
        return self._view(first, last, norm=False)(**kwargs).last_hidden_state[0]

    @cached_property
    def _stages(self) -> bool:
        """Whether the layers in two stages give what they give in one; not so where embeddings are scaled on entering.

        Tried, like everything else about an architecture.
        """
        if self.layers < 2:
            return True
        rows, half = torch.arange(12), self.layers // 2
        ids = rows % self.config.vocab_size
        once, staged = self.canvas(12), self.canvas(12)
        self.forward(ids, rows, once, logits=0)
        stream = self._view(0, half, norm=False)(**self._inputs(ids, rows, staged))
        self.forward(stream.last_hidden_state[0], rows, staged, first=half, logits=0)
        return relative_error(staged.values, once.values) < 0.1

    def _inputs(
        self,
        x: Tensor,
        rows: Tensor,
        canvas: Canvas,
        positions: Tensor | None = None,
        probe: Probe | None = None,
        shape: Shape | None = None,
        floors: Tensor | None = None,
    ) -> dict[str, Any]:
        used = self.config._attn_implementation
        if used != self.attention and used not in IMPLEMENTATIONS:
            raise ConfigurationError(
                f'the model\'s attention was set to "{used}" after it was given to Backbone: put it back by '
                f'model.set_attn_implementation("{self.attention}"), and load another model for other purposes'
            )
        sparse = Sparse(rows, self.device, probe, shape, floors)
        canvas.aim(sparse)
        return {
            "inputs_embeds" if x.is_floating_point() else "input_ids": x.to(self.device)[None],
            "position_ids": sparse.rows[None] if positions is None else positions.to(self.device)[None],
            cache_argument(self.model): canvas,
            "use_cache": True,
            "cacheclip": sparse,
        }

    def _view(self, first: int, last: int, norm: bool = True) -> nn.Module:
        """The decoder without its head, cut to the layers ``[first, last)``; the weights are shared.

        Without ``norm`` it returns the residual stream as it is.
        """
        decoder = self.model.base_model
        if (first, last, norm) == (0, self.layers, True):
            return decoder
        name = (first, last, norm)
        if name not in self._views:
            view = copy.copy(decoder)
            view._modules = dict(decoder._modules)
            view.layers = decoder.layers[first:last]
            view.config = copy.copy(decoder.config)
            view.config.num_hidden_layers = last - first
            if types := getattr(self.config, "layer_types", None):
                view.config.layer_types = types[first:last]  # some models look kinds up by place, not by layer
            if not norm:
                view.norm = nn.Identity()
            self._views[name] = view
        return self._views[name]

    def _head_view(self, first: int) -> nn.Module:
        """The whole model from layer ``first`` on."""
        if first == 0:
            return self.model
        if first not in self._head_views:
            view = copy.copy(self.model)
            view._modules = dict(self.model._modules)
            setattr(view, self.model.base_model_prefix, self._view(first, self.layers))
            self._head_views[first] = view
        return self._head_views[first]


def cache_argument(model: nn.Module) -> str:
    """What a model's forward calls the cache that it is given: ``cache`` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def relative_error(a: Tensor | None, b: Tensor) -> float:
    """``|a - b| / |b|``, in float32. NaN where either holds one."""
    assert a is not None
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12))
