"""A model of transformers: load, forward, generate, and whether its KV can be composed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from .attention import AUTO, NOTING, Enough, Shape, Sparse, choose, windows_given
from .attention.mask import Probe
from .canvas import Canvas
from .errors import NotComposable, WeightsError
from .fingerprint import fingerprint
from .rotary import Rotary
from .texts import Texts


class Backbone(Texts):
    """A causal language model of transformers with its tokenizer, and the few operations the engine needs of them.

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
        self.obstacle: str | None = self._find_obstacle()
        """Why chunks cannot be composed with this model, or None."""
        if self.obstacle is None:
            model.set_attn_implementation(self.attention)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device = "auto",
        attention: str = AUTO,
    ) -> Backbone:
        """Load from a folder. ``dtype="auto"`` takes bfloat16 where the hardware multiplies it natively, else float32;
        ``attention="auto"`` takes the Triton kernel where there is a GPU on which it runs, else PyTorch's attention.

        Raises `WeightsError` when the folder holds no causal language model with a fast tokenizer.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = best_dtype(torch.device(device))
        elif isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path} holds no causal language model that transformers can load: {error}") from error
        if not tokenizer.is_fast:
            raise WeightsError(f"{path} has no fast tokenizer; character offsets need one (tokenizer.json)")
        return cls(model.to(device), tokenizer, attention=attention)

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
        return _relative(staged.values, once.values) < 0.1

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
        sparse = Sparse(rows, self.device, probe, shape, floors)
        canvas.aim(sparse)
        return {
            "inputs_embeds" if x.is_floating_point() else "input_ids": x.to(self.device)[None],
            "position_ids": sparse.rows[None] if positions is None else positions.to(self.device)[None],
            "past_key_values": canvas,
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

    def generate(
        self,
        prompt_ids: Tensor,
        logits: Tensor,
        step: Callable[[Tensor, int], Tensor],
        **options: Any,
    ) -> Iterator[int]:
        """Decode after a prefill: yields token ids until transformers says stop.

        ``prompt_ids [T]``; the prompt's last ``logits [1, V]``; ``step(id [1], row)`` computes the next ones (see
        `on_canvas`). ``options`` are those of ``model.generate``, which prepares logits processors and stopping
        criteria; the loop is ours (its ``custom_generate`` seam), because the first token needs no forward here and the
        caller may pause or stop between any two. Closing the iterator ends it.
        """

        def loop(
            model: PreTrainedModel,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: Any,
            **_: Any,
        ) -> Iterator[int]:
            scores, row = logits, len(prompt_ids)
            while True:
                with torch.inference_mode():
                    scores = logits_processor(input_ids, scores)
                    if generation_config.do_sample:
                        token = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
                    else:
                        token = scores.argmax(dim=-1, keepdim=True)
                    input_ids = torch.cat([input_ids, token.to(input_ids.device)], dim=-1)
                    done = bool(stopping_criteria(input_ids, None).all())
                yield int(token)
                if done:
                    return
                scores, row = step(token[0], row), row + 1

        return self.model.generate(
            prompt_ids.to(self.device)[None],
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long, device=self.device),
            custom_generate=loop,
            **options,
        )

    def ends(self, given: int | Sequence[int] | None = None) -> frozenset[int]:
        """The tokens that end an answer: those ``given``, else the model's own."""
        ids = self.model.generation_config.eos_token_id if given is None else given
        return frozenset([ids] if isinstance(ids, int) else ids or ())

    def on_canvas(
        self, canvas: Canvas, *, shift: int = 0, shape: Shape | None = None
    ) -> Callable[[Tensor, int], Tensor]:
        """The decoding step of `generate` that appends to ``canvas``: ``step(ids [n], row)`` gives logits ``[n, V]``.

        Positions are the rows plus ``shift``.
        """

        def step(tokens: Tensor, row: int) -> Tensor:
            rows = torch.arange(row, row + len(tokens))
            positions = rows + shift if shift else None
            logits = self.forward(tokens, rows, canvas, positions=positions, logits=len(tokens), shape=shape)
            assert logits is not None
            return logits

        return step

    @torch.inference_mode()
    def native_prefill(self, ids: Tensor) -> tuple[Tensor, Callable[[Tensor, int], Tensor]]:
        """Full prefill with transformers' own cache and attention, for models that cannot be composed.

        Returns the last ``logits [1, V]`` and the decoding step of `generate`.
        """
        output = self.model(input_ids=ids.to(self.device)[None], use_cache=True, logits_to_keep=1)
        cache = output.past_key_values

        @torch.inference_mode()
        def step(tokens: Tensor, row: int) -> Tensor:
            ids = tokens.to(self.device)[None]
            positions = torch.arange(row, row + len(tokens), device=self.device)[None]
            output = self.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
            return output.logits[0].float()

        return output.logits[0].float(), step

    @torch.inference_mode()
    def own_logits(self, ids: Tensor, count: int) -> Tensor:
        """The last ``count`` tokens' logits ``[count, V]`` by transformers' eager attention, without any cache.

        What everything else is measured against. The model's attention is another one meanwhile, so no request may run.
        """
        self.model.set_attn_implementation("eager")
        try:
            output = self.model(input_ids=ids.to(self.device)[None], use_cache=False, logits_to_keep=count)
        finally:
            self.model.set_attn_implementation(self.attention)
        return output.logits[0].float()

    # ---- composability and identity -------------------------------------------------------------------------------

    @property
    def rotary(self) -> Rotary:
        """The rotation that moves this model's keys. Raises `NotComposable` where there is none."""
        if self.obstacle is not None:
            raise NotComposable(self.obstacle)
        return Rotary(self._inverse_frequencies())

    def _inverse_frequencies(self) -> Tensor:
        """``[L, d/2]`` (or ``[1, d/2]`` when all layers share it), read from the model's own rotary module."""
        module = self.model.base_model.rotary_emb
        if hasattr(module, "inv_freq"):
            return module.inv_freq[None]
        return torch.stack([getattr(module, f"{kind}_inv_freq") for kind in self.config.layer_types])

    @property
    def full_layers(self) -> list[int]:
        """The layers that attend to the whole context (the others see a sliding window)."""
        types = getattr(self.config, "layer_types", None) or ["full_attention"] * self.layers
        return [i for i, kind in enumerate(types) if kind == "full_attention"] or list(range(self.layers))

    @property
    def sliding_window(self) -> int | None:
        """How far the `full_layers` see, in tokens; None for everything. Only where every layer has a window."""
        types = getattr(self.config, "layer_types", None) or []
        return None if "full_attention" in types else getattr(self.config, "sliding_window", None)

    def _find_obstacle(self) -> str | None:
        """Why this model cannot be composed, or None: first by its configuration, then by trying it on a few tokens.

        Trying decides: whatever an architecture is called, its keys must move by one rotation, and our attention must
        give its own logits.
        """
        name = self.config.model_type
        types = set(getattr(self.config, "layer_types", None) or [])
        if strange := types - {"full_attention", "sliding_attention"}:
            return f"{name} has {', '.join(sorted(strange))} layers, which keep no key per token"
        rope = getattr(self.config, "rope_parameters", None) or {}
        nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
        for kind in {r.get("rope_type", "default") for r in nested}:
            if kind in ("dynamic", "longrope"):
                return f"{name} uses {kind} RoPE scaling: its angles depend on the prompt's length, so keys cannot move"
        try:
            return self._try_out()
        except (AttributeError, RuntimeError, TypeError, ValueError, IndexError) as error:
            return f"{name} could not be tried out on a canvas: {type(error).__name__}: {error}"

    @torch.inference_mode()
    def _try_out(self) -> str | None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.config.vocab_size, (12,), generator=generator)
        rows, shift = torch.arange(12), 20
        own = self.model(input_ids=ids.to(self.device)[None], use_cache=False).logits[0].float()
        native = self.model.config._attn_implementation
        self.model.set_attn_implementation(self.attention)
        try:
            here, there = self.canvas(12), self.canvas(12)
            for canvas in (here, there):  # what no layer writes must not pass by what memory happens to hold
                canvas.keys.fill_(float("nan"))
                canvas.values.fill_(float("nan"))
            ours = self.forward(ids, rows, here, logits=12)
            # Attention is relative: the same tokens elsewhere must give the same keys up to one rotation.
            self.forward(ids, rows, there, positions=rows + shift, logits=0)
            rotated = Rotary(self._inverse_frequencies()).rotate(here.keys[:, 0], shift)
            self.model.set_attn_implementation(NOTING)
            last = self.forward(ids, rows, self.canvas(12), logits=1)  # some models narrow their last layers to it
            given = windows_given(self.model)
        finally:
            self.model.set_attn_implementation(native)
        name = self.config.model_type
        if here.keys.isnan().any() or here.values.isnan().any():
            return f"{name}: some layers keep no keys and values of their own"
        # A dozen tokens lie within any window: whether a layer's is heeded shows in what its attention is given.
        wanted = dict(enumerate(self._windows()))
        if strange := [layer for layer, window in wanted.items() if window and window != given.get(layer)]:
            return f"{name}: its attention is not told the sliding window of layer {strange[0]}"
        # Rounding stays far below a tenth in bfloat16; a wrong layout or an ignored argument is of order one. What is
        # no number is not below anything.
        if not (error := _worst([ours, last], [own, own[-1:]])) <= 0.1:
            return f"{name}: our attention differs from the model's own by {error:.0%}"
        if not (error := _worst(rotated, there.keys[:, 0])) <= 0.1:
            return f"{name}: its keys do not move by a rotation (off by {error:.0%})"
        if not (error := _worst(here.values, there.values)) <= 0.1:
            return f"{name}: its values depend on the absolute position (off by {error:.0%})"
        return None

    def _windows(self) -> list[int | None]:
        """The sliding window of each layer as the configuration has it, None for none below the model's own window."""
        window = getattr(self.config, "sliding_window", None)
        if window is not None and window >= self.window:
            window = None
        types = getattr(self.config, "layer_types", None) or ["sliding_attention"] * self.layers
        return [window if kind == "sliding_attention" else None for kind in types]

    def fingerprint(self) -> dict[str, str]:
        """What identifies this model for stored KV (see `fingerprint.fingerprint`)."""
        return fingerprint(self.model, self.config, self._encoder.to_str(), self.dtype)


def _relative(a: Tensor | None, b: Tensor) -> float:
    assert a is not None
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12))


def _worst(a: Iterable[Tensor | None], b: Iterable[Tensor]) -> float:
    """`_relative` of the layer that is furthest off: a layer of large numbers must not hide one of small ones.

    NaN where one of them is.
    """
    return float(torch.tensor([_relative(one, other) for one, other in zip(a, b, strict=True)]).max())


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on accelerators and on CPUs with bfloat16 instructions, else float32."""
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16
