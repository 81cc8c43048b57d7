"""The forward of a transformers model over a canvas: all layers or some of them, in one go or in stages."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compute import Part, Rotation, StopForward
from ..errors import ConfigurationError, NotComposable
from .attention import AUTO, IMPLEMENTATIONS, SharedRows, SparseRows, choose
from .canvas import Canvas
from .decode_weights import decoding
from .inference import inferring
from .rotary import PerTokenRotation, Rotary
from .together import SharedCanvas

PIECE = 256
"""Rows of a prefill between two decoding steps of other requests."""
ROWS = 2048
"""Rows of a forward without hooks at most. More are computed in several forwards, so that activations stay small."""


class Layers:
    """The forward of a causal language model of transformers: a `Computer` whose workspaces are canvases.

    Thread-safe: a forward keeps its state in its own `Canvas`.
    """

    def __init__(self, model: PreTrainedModel, *, attention: str = AUTO) -> None:
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
        self.context_length: int = int(getattr(self.config, "max_position_embeddings", 0) or 2**31)
        self.between: WeakMethod[Callable[[], None]] | None = None
        """Called during a forward, each time about as much as `PIECE` rows of the whole model has been computed: for
        other requests' steps, which are forwards of their own.
        """
        self._since = 0
        self._views: dict[tuple[int, int, bool], nn.Module] = {}
        self._causal_lm_views: dict[int, nn.Module] = {}

    # ---- what the layers are --------------------------------------------------------------------------------------

    def inverse_frequencies(self) -> Tensor:
        """RoPE's inverse frequencies ``[L, d/2]`` (``[1, d/2]`` if all layers share them), from the model's module."""
        module = self.model.base_model.rotary_emb
        if hasattr(module, "inv_freq"):
            return module.inv_freq[None]
        return torch.stack([getattr(module, f"{kind}_inv_freq") for kind in self.config.layer_types])

    @cached_property
    def windows(self) -> list[int | None]:
        """Each layer's sliding window according to the configuration, in tokens; None for a layer with full attention,
        or with a window as long as the context length.
        """
        window = getattr(self.config, "sliding_window", None)
        if window is not None and window >= self.context_length:
            window = None
        types = getattr(self.config, "layer_types", None) or ["sliding_attention"] * self.layers
        return [window if kind == "sliding_attention" else None for kind in types]

    @property
    def full_layers(self) -> list[int]:
        """The layers with full attention; all layers if every one has a sliding window."""
        return [layer for layer, window in enumerate(self.windows) if window is None] or list(range(self.layers))

    @property
    def sliding_window(self) -> int | None:
        """The sliding window of the `full_layers` in tokens; None unless every layer has one."""
        return None if None in self.windows else self.windows[0]

    # ---- forward --------------------------------------------------------------------------------------------------

    def workspace(self, capacity: int, layers: int | None = None) -> Canvas:
        """An empty canvas of ``capacity`` slots. ``layers``: only the first ones, for forwards that go no deeper."""
        return Canvas(
            layers or self.layers,
            self.kv_heads,
            self.head_dim,
            capacity,
            dtype=self.dtype,
            device=self.device,
            rotary=self.rotary,
        )

    @cached_property
    def rotary(self) -> Rotary | None:
        """The rotation that moves this model's keys; None if its rotary module cannot be read."""
        try:
            return Rotary(self.inverse_frequencies())
        except (AttributeError, RuntimeError, TypeError):
            return None

    def rotation(self, by: Tensor) -> Rotation:
        """The rotation that moves one layer's keys, token j by ``by[j]`` positions (see `PerTokenRotation`)."""
        assert self.rotary is not None
        return PerTokenRotation(self.rotary, by)

    def over_ranks(self, scores: Tensor) -> Tensor:
        """As `Computer.over_ranks`: this process holds all heads."""
        return scores

    def forward(
        self, parts: Sequence[Part], *, first: int = 0, depth: int | None = None, logits: int = 1
    ) -> list[Tensor | None]:
        """As `Computer.forward`; parts are run one after the other."""
        return [self.forward_one(part, first=first, depth=depth, logits=logits) for part in parts]

    def advance(self, parts: Sequence[Part], first: int, last: int) -> list[Tensor]:
        """As `Computer.advance`; parts are run one after the other."""
        return [self.advance_one(part, first, last) for part in parts]

    @inferring
    def forward_one(
        self,
        part: Part,
        *,
        first: int = 0,
        depth: int | None = None,
        logits: int = 1,
        floors: Tensor | None = None,
    ) -> Tensor | None:
        """Compute one request's rows; their KV is written before they attend.

        ``floors [S]``: the first slot that each row may see, if several texts share a canvas; not with hooks or a score
        modification. The rest as in `Computer.forward`.
        Source: the sparse prefill of CacheBlend and EPIC, with the causal mask of `compute.visible`.
        """
        plain = not part.hooks and part.score_mod is None and floors is None and part.x.dim() == 1
        if plain and len(part.rows) > ROWS and logits <= ROWS:
            *before, last = _pieces(part, ROWS)
            for piece in before:
                self.forward_one(piece, first=first, depth=depth or self.layers, logits=0)
            return self.forward_one(last, first=first, depth=depth, logits=logits)
        kwargs = self._inputs(part, floors)
        # KV is kept under the name of the model's own precision, whatever the caller has switched on.
        with torch.autocast(self.device.type, enabled=False), suppress(StopForward):
            if logits and depth is None:
                output = self._causal_lm_view(first)(**kwargs, logits_to_keep=logits)
                return output.logits[0].float()
            self._view(first, depth or self.layers)(**kwargs)
        return None

    @inferring
    def steps(self, parts: Sequence[Part]) -> list[Tensor]:
        """One forward over the rows of several requests; returns, for each part, the logits ``[S, V]`` float32 of all
        its rows. The parts have token ids, distinct canvases and no hooks.
        """
        if len(parts) == 1:
            with decoding():
                alone = self.forward_one(parts[0], logits=len(parts[0].rows))
            assert alone is not None
            return [alone]
        each, cache = [self._inputs(part, pausing=False) for part in parts], cache_argument(self.model)
        shared = SharedRows([one["cacheclip"] for one in each], [one[cache] for one in each])
        kwargs = {
            **{name: torch.cat([one[name] for one in each], dim=1) for name in ("input_ids", "position_ids")},
            cache: SharedCanvas(shared),
            "use_cache": True,
            "cacheclip": shared,
        }
        with torch.autocast(self.device.type, enabled=False), decoding():
            logits = self.model(**kwargs, logits_to_keep=0).logits[0].float()
        return list(logits.split([len(part.rows) for part in parts]))

    @inferring
    def advance_one(self, part: Part, first: int, last: int, floors: Tensor | None = None) -> Tensor:
        """Run the layers ``[first, last)`` for one request; returns the residual stream ``[S, d]`` entering ``last``.

        For methods that change their rows half way through the model (DroidSpeak). Raises `NotComposable` for a model
        that cannot be run in stages.
        """
        if not self._stages:
            raise NotComposable(f"{self.config.model_type} does something to its input that stages would repeat")
        with torch.autocast(self.device.type, enabled=False):
            return self._view(first, last, norm=False)(**self._inputs(part, floors)).last_hidden_state[0]

    @cached_property
    def _stages(self) -> bool:
        """Whether two stages give the same result as one forward; not if a model scales its input embeddings.

        It is tried on a few tokens, because a configuration does not say.
        """
        if self.layers < 2:
            return True
        rows, half = torch.arange(12), self.layers // 2
        ids = rows % self.config.vocab_size
        once, staged = self.workspace(12), self.workspace(12)
        self.forward_one(Part(once, ids, rows), logits=0)
        stream = self._view(0, half, norm=False)(**self._inputs(Part(staged, ids, rows)))
        self.forward_one(Part(staged, stream.last_hidden_state[0], rows), first=half, logits=0)
        return relative_error(staged.values, once.values) < 0.1

    def _pause(self, rows: int) -> None:
        """Called by each layer before its attention over so many rows."""
        self._since += rows
        if self.between is not None and self._since >= PIECE * self.layers and (between := self.between()) is not None:
            self._since = 0
            between()

    def _inputs(self, part: Part, floors: Tensor | None = None, pausing: bool = True) -> dict[str, Any]:
        used = self.config._attn_implementation
        if used != self.attention and used not in IMPLEMENTATIONS:
            raise ConfigurationError(
                f'the model\'s attention was set to "{used}" after it was given to Backbone: put it back by '
                f'model.set_attn_implementation("{self.attention}"), and load another model for other purposes'
            )
        canvas, x = part.workspace, part.x
        assert isinstance(canvas, Canvas)
        pause = self._pause if pausing else None
        sparse = SparseRows(part.rows, self.device, canvas, part.hooks, part.score_mod, floors, pause)
        canvas.set_write_rows(sparse)
        positions = sparse.rows if part.positions is None else part.positions.to(self.device)
        return {
            "inputs_embeds" if x.is_floating_point() else "input_ids": x.to(self.device)[None],
            "position_ids": positions[None],
            cache_argument(self.model): canvas,
            "use_cache": True,
            "cacheclip": sparse,
        }

    def _view(self, first: int, last: int, norm: bool = True) -> nn.Module:
        """The decoder without its lm head, cut to the layers ``[first, last)``; the weights are shared.

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
                view.config.layer_types = types[first:last]  # some models index it by position in `layers`
            if not norm:
                view.norm = nn.Identity()
            self._views[name] = view
        return self._views[name]

    def _causal_lm_view(self, first: int) -> nn.Module:
        """The model with its lm head, from layer ``first`` on; the weights are shared."""
        if first == 0:
            return self.model
        if first not in self._causal_lm_views:
            view = copy.copy(self.model)
            view._modules = dict(self.model._modules)
            setattr(view, self.model.base_model_prefix, self._view(first, self.layers))
            self._causal_lm_views[first] = view
        return self._causal_lm_views[first]


def _pieces(part: Part, most: int) -> Iterator[Part]:
    """A part's rows in parts of at most ``most`` rows each, in order."""
    for start in range(0, len(part.rows), most):
        cut = slice(start, start + most)
        positions = None if part.positions is None else part.positions[cut]
        yield dataclasses.replace(part, x=part.x[cut], rows=part.rows[cut], positions=positions)


def cache_argument(model: nn.Module) -> str:
    """The name of the cache argument of a model's forward: ``cache`` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def relative_error(a: Tensor | None, b: Tensor) -> float:
    """``|a - b| / |b|`` in float32; NaN if either contains NaN."""
    assert a is not None
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12))
