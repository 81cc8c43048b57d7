"""A model of transformers with its tokenizer: loading, the forward over a canvas, decoding, and its own prefill."""

from __future__ import annotations

import difflib
import inspect
import time
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from ..compute import Hook, Part, ScoreMod, on_cpu
from ..deprecation import renamed_attribute
from ..errors import ConfigurationError, NotComposable, WeightsError
from ..prompt import RenderedPrompt, Tokens
from .attention import AUTO
from .canvas import Canvas
from .composability import obstacle_of
from .decode_weights import DecodeWeights, Format, check, decoding
from .fingerprint import fingerprint, origin
from .inference import inference, inferring
from .layers import Layers, cache_argument
from .packed import pack
from .rotary import Rotary
from .state import State, state_of
from .threads import fit_threads
from .tokenizer import PromptTokenizer

_ONE_ANSWER = {"num_beams": 1, "num_return_sequences": 1, "stop_strings": None}
"""Overrides of the model's generation config, for settings that our decoding loop does not support."""


class Backbone:
    """A causal language model of transformers with its tokenizer, and the operations the engine needs of them.

    ``computer`` runs forwards (see `Layers`), ``texts`` tokenises text and renders chat messages; the common operations
    of both are methods here. Thread-safe: a forward keeps its state in its own `Canvas`.
    """

    @on_cpu
    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, attention: str = AUTO) -> None:
        """Wrap ``model``, and set its attention implementation to ours, which takes one text at a time and no padding.

        For batches, load another model. If the implementation is changed afterwards, every forward here raises
        `ConfigurationError`. ``attention``: see `attention.choose`, which may raise.
        """
        self.texts = PromptTokenizer(tokenizer)
        self.trained: Path | None = None
        """The folder of `cacheclip tune` that it was opened from, or None."""
        self.soft = (0, 0)
        """How many soft tokens it was trained with before and behind each chunk (see `soft`)."""
        self.computer = Layers(model, attention=attention)
        self.model, self.tokenizer, self.config = self.computer.model, tokenizer, self.computer.config
        self.device, self.dtype, self.attention = self.computer.device, self.computer.dtype, self.computer.attention
        self.layers, self.kv_heads, self.head_dim = (
            self.computer.layers,
            self.computer.kv_heads,
            self.computer.head_dim,
        )
        self._known: tuple[State, dict[str, str]] | None = None
        self.decode_weights: DecodeWeights | None = None
        """The copies of weights that decoding steps of few rows read; None if they read the model's own."""
        self.obstacle: str | None = obstacle_of(self.computer)
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
        packed: bool = True,
        decode_weights: Format = "auto",
    ) -> Backbone:
        """Load a model from a folder.

        ``dtype="auto"`` takes bfloat16 if the hardware multiplies it natively, else float32; ``attention="auto"`` takes
        the Triton kernel on a GPU that runs it, else PyTorch's attention. PyTorch's threads are limited to the CPUs
        that this process may use (see `threads`). ``packed``: on a CPU, keep bfloat16 weights in the layout that its
        kernels read, which makes decoding faster (docs/decoding.md); False leaves them trainable (see `packed`).
        ``decode_weights``: "int4" keeps a second copy of them in 4 bits for decoding steps of few rows (see
        `decode_weights`), on a CPU.

        Raises `WeightsError` unless the folder holds a causal language model with a fast tokenizer, and
        `ConfigurationError`.
        """
        check(decode_weights)
        fit_threads()
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
        backbone = cls(model.to(device), tokenizer, attention=attention)
        if packed:
            known = backbone.fingerprint()  # of packed weights it would take a copy of all of them
            pack(backbone.model)
            backbone._known = backbone.state(), known
        if decode_weights == "int4":
            backbone.decode_weights = DecodeWeights(backbone.model)
        return backbone

    # ---- texts ----------------------------------------------------------------------------------------------------

    def tokenise(self, text: str, plain: bool = False) -> Tokens:
        """Token ids without added special tokens. ``plain``: control tokens in the text stay ordinary characters."""
        return self.texts.tokenise(text, plain)

    def tokenise_prompt(
        self, prompt: str, documents: Sequence[tuple[int, int]] = (), tokens: Tokens | None = None
    ) -> Tokens:
        """A whole prompt's tokens. ``documents``: character spans in which control tokens stay text; ``tokens``: the
        result of `tokenise`, if the caller has it.
        """
        return self.texts.tokenise_prompt(prompt, documents, tokens)

    def quotes(self, text: str) -> bool:
        """Whether control tokens occur in a text (see `PromptTokenizer.quotes`)."""
        return self.texts.quotes(text)

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> RenderedPrompt:
        """The prompt for chat ``messages``, up to the assistant's turn; their texts joined if there is no template."""
        return self.texts.chat(messages, **options)

    def shared_prefix(self) -> str:
        """The default encode prefix: what precedes a user's text in this model's chat template."""
        return self.texts.shared_prefix()

    @property
    def control_tokens(self) -> list[str]:
        """The texts of the tokenizer's control tokens, such as "<|im_end|>"."""
        return self.texts.control_tokens

    @property
    def opening(self) -> str:
        """What precedes the user's text in this model's chat template; empty without a template."""
        return self.texts.opening

    @property
    def closing(self) -> str:
        """What follows the user's text in this model's chat template, up to the beginning of the answer."""
        return self.texts.closing

    # ---- forward --------------------------------------------------------------------------------------------------

    @property
    def context_length(self) -> int:
        """The maximum length of a prompt and its answer, in tokens."""
        return self.computer.context_length

    @context_length.setter
    def context_length(self, length: int) -> None:
        self.computer.context_length = length

    window = renamed_attribute("window", "context_length")

    @property
    def full_layers(self) -> list[int]:
        """The layers with full attention; all layers if every one has a sliding window."""
        return self.computer.full_layers

    @property
    def sliding_window(self) -> int | None:
        """The sliding window of the `full_layers` in tokens; None unless every layer has one."""
        return self.computer.sliding_window

    def canvas(self, capacity: int, layers: int | None = None) -> Canvas:
        """An empty canvas of ``capacity`` slots. ``layers``: only the first ones, for forwards that go no deeper."""
        return self.computer.workspace(capacity, layers)

    def forward(
        self,
        x: Tensor,
        rows: Tensor,
        canvas: Canvas,
        *,
        positions: Tensor | None = None,
        logits: int = 1,
        hooks: Sequence[Hook] = (),
        score_mod: ScoreMod | None = None,
        floors: Tensor | None = None,
        first: int = 0,
        depth: int | None = None,
    ) -> Tensor | None:
        """Compute the tokens ``x [S]`` int64 at canvas ``rows [S]`` int64 (strictly increasing), and write their KV.

        This one operation is full prefill (all rows on an empty canvas), selective recompute (scattered rows over
        placed chunks) and a decoding step (one row). Returns the logits ``[logits, V]`` float32 of the last ``logits``
        rows; None with ``logits=0``, which skips the lm head, and if a hook raised `StopForward`. ``depth``: run the
        layers below it only (no logits). ``first``: start at this layer, from the residual stream ``x [S, d]`` that
        `advance` returned. ``positions [S]``: RoPE positions, if they differ from the slots; ``floors [S]``: the first
        slot that each row may see, if several texts share the canvas; ``hooks`` and ``score_mod``: as in
        `compute.Part`.
        """
        part = Part(canvas, x, rows, positions, hooks, score_mod)
        return self.computer.forward_one(part, first=first, depth=depth, logits=logits, floors=floors)

    def advance(
        self,
        x: Tensor,
        rows: Tensor,
        canvas: Canvas,
        first: int,
        last: int,
        *,
        positions: Tensor | None = None,
        hooks: Sequence[Hook] = (),
        score_mod: ScoreMod | None = None,
        floors: Tensor | None = None,
    ) -> Tensor:
        """Run the layers ``[first, last)`` only; returns the residual stream ``[S, d]`` that enters layer ``last``.

        ``x`` is token ids ``[S]`` for ``first=0``, else the residual stream entering layer ``first``; other arguments
        as in `forward`. Raises `NotComposable` for a model that cannot be run in stages.
        """
        return self.computer.advance_one(Part(canvas, x, rows, positions, hooks, score_mod), first, last, floors)

    # ---- decoding -------------------------------------------------------------------------------------------------

    @on_cpu
    def generate(
        self,
        prompt_ids: Tensor,
        logits: Tensor,
        step: Callable[[Tensor, int], Tensor],
        *,
        seed: int | None = None,
        drafts: Drafts | None = None,
        **options: Any,
    ) -> Generator[int, None, None]:
        """Decode after a prefill: yields token ids until transformers' stopping criteria end the answer.

        ``prompt_ids [T]``; ``logits [1, V]`` of the prompt's last token; ``step(ids [n], row)`` computes the logits
        ``[n, V]`` of the next tokens (see `CanvasStep`). ``drafts`` proposes tokens that one step verifies together;
        None for a step each. ``options`` are those of ``model.generate``, which prepares logits processors and stopping
        criteria. The loop is ours (passed as ``custom_generate``), because the first token needs no forward, and the
        caller may pause or stop between tokens. Closing the iterator ends it. ``seed``: sample with a generator of its
        own, so that nobody else's sampling changes the answer; None takes torch's, which all share.
        """
        random = None if seed is None else torch.Generator(logits.device).manual_seed(seed)

        def loop(
            model: PreTrainedModel,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: Any,
            **_: Any,
        ) -> Iterator[int]:
            written = np.empty(generation_config.max_length + 1, np.int64)
            written[: len(prompt_ids)] = prompt_ids.cpu().numpy()
            # The logits [n, V] behind `row` and the next tokens of `draft`, of which `place` were accepted.
            rows, row, draft, place = logits, len(prompt_ids), written[:0], 0
            try:
                while True:
                    with inference():
                        scores = logits_processor(input_ids, rows[place : place + 1])
                        if generation_config.do_sample:
                            token = torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=random)
                        else:
                            token = scores.argmax(dim=-1, keepdim=True)
                        input_ids = torch.cat([input_ids, token.to(input_ids.device)], dim=-1)
                        done = bool(stopping_criteria(input_ids, None).all())
                    written[row] = int(token)
                    accepted = place < len(draft) and int(draft[place]) == int(token)
                    place += accepted
                    if drafts is not None and not accepted:
                        drafts.note(len(draft), place)
                        draft = draft[:0]
                    yield int(token)
                    if done:
                        return
                    row += 1
                    if accepted:
                        continue
                    if drafts is not None:
                        draft = drafts.propose(written[:row], generation_config.max_length - row - 1)
                    place, start = 0, time.perf_counter()
                    rows = step(torch.from_numpy(np.append(written[row - 1], draft)), row - 1)
                    if drafts is not None:
                        drafts.took(time.perf_counter() - start, len(draft))
            finally:
                if drafts is not None and len(draft):  # the answer ended, or was ended, inside a draft
                    drafts.note(len(draft), place)

        gradients = torch.is_grad_enabled()
        try:
            return self.model.generate(
                prompt_ids.to(self.device)[None],
                attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long, device=self.device),
                custom_generate=loop,
                **(_ONE_ANSWER | options),
            )
        finally:  # an interrupt may have kept transformers' `no_grad` from it
            torch._C._set_grad_enabled(gradients)

    def check_options(self, options: Mapping[str, Any], effective: Container[str]) -> None:
        """Raises `ConfigurationError` for names that are not options of ``model.generate``, and for options outside
        ``effective`` whose value differs from the model's default.
        """
        config = self.model.generation_config
        known = {*vars(config), *inspect.signature(self.model.generate).parameters} - {"self", "kwargs"}
        for name, value in options.items():
            if name not in known:
                close = difflib.get_close_matches(name, known | {"max_new_tokens"}, n=1)
                hint = f'; did you mean "{close[0]}"?' if close else ""
                raise ConfigurationError(f'"{name}" is no option of a request or of transformers\' generate{hint}')
            default = getattr(config, name, None)
            if name not in effective and value not in (None, default) and not (value is False and not default):
                raise ConfigurationError(
                    f"{name}={value!r} is not possible here: answers are decoded greedily or sampled, one at a time"
                )

    @on_cpu
    def ends(self, given: int | Sequence[int] | None = None) -> frozenset[int]:
        """The ids of the tokens that end an answer: those ``given``, else the model's own."""
        ids = self.model.generation_config.eos_token_id if given is None else given
        return frozenset() if ids is None else frozenset(torch.as_tensor(ids).flatten().tolist())

    def on_canvas(
        self, canvas: Canvas, *, shift: int = 0, score_mod: ScoreMod | None = None, soft: int = 0
    ) -> CanvasStep:
        """The decoding step for `generate` on a canvas: see `CanvasStep`."""
        return CanvasStep(self.computer, canvas, shift, score_mod, soft)

    @inferring
    def native_prefill(self, ids: Tensor) -> tuple[Tensor, Callable[[Tensor, int], Tensor]]:
        """Full prefill of ``ids [T]`` with transformers' own cache and attention, for models that cannot be composed.

        Returns the logits ``[1, V]`` of the last token and the decoding step for `generate`.
        """
        output = self.model(input_ids=ids.to(self.device)[None], use_cache=True, logits_to_keep=1)
        name = cache_argument(self.model)
        cache = getattr(output, name)

        @inferring
        def step(tokens: Tensor, row: int) -> Tensor:
            ids = tokens.to(self.device)[None]
            positions = torch.arange(row, row + len(tokens), device=self.device)[None]
            with decoding():
                output = self.model(input_ids=ids, position_ids=positions, use_cache=True, **{name: cache})
            return output.logits[0].float()

        return output.logits[0].float(), step

    @inferring
    def own_logits(self, ids: Tensor, count: int) -> Tensor:
        """The logits ``[count, V]`` of the last ``count`` tokens by transformers' eager attention, without any cache.

        It is the reference for verification. It changes the model's attention temporarily, so no request may run.
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
        """The rotation that moves this model's keys. Raises `NotComposable` for a model without one."""
        if self.obstacle is not None or self.computer.rotary is None:
            raise NotComposable(self.obstacle or "the model has no rotation that moves its keys")
        return self.computer.rotary

    def fingerprint(self) -> dict[str, str]:
        """What identifies this model in the namespace of its stored KV (see `fingerprint.fingerprint`)."""
        state = self.state()
        if self._known is None or self._known[0] != state:
            self._known = state, fingerprint(self.model, self.config, self.texts.definition, self.dtype)
        return self._known[1]

    def origin(self) -> dict[str, str]:
        """What identifies this model to an adapter, whatever dtype it is in (see `fingerprint.origin`)."""
        return origin(self.model, self.config, self.texts.definition)

    def state(self) -> State:
        """Another value once weights, mode, hooks or adapters have changed (see `state.state_of`)."""
        return state_of(self.model)


class Drafts(Protocol):
    """Proposes the next tokens of an answer (see `serving.lookup`)."""

    def propose(self, ids: NDArray[np.int64], most: int) -> NDArray[np.int64]:
        """At most ``most`` tokens that may follow ``ids [n]``, the prompt and the answer so far."""

    def took(self, seconds: float, drafted: int) -> None:
        """A step with so many drafted tokens took so long."""

    def note(self, drafted: int, accepted: int) -> None:
        """Of so many drafted tokens, the first ``accepted`` were the model's own."""


@dataclass(frozen=True, eq=False)
class CanvasStep:
    """The decoding step on a canvas: ``step(ids [n], row)`` appends n tokens, the first one at ``row``, and returns
    their logits ``[n, V]`` float32.

    ``row`` counts the tokens of prompt and answer. A canvas with ``soft`` soft tokens has so many slots more; RoPE
    positions are the slots plus ``shift``. What stands on the canvas from there on, of a draft that was not accepted,
    is overwritten.
    """

    computer: Layers
    canvas: Canvas
    shift: int = 0
    score_mod: ScoreMod | None = None
    soft: int = 0

    def part(self, tokens: Tensor, row: int) -> Part:
        """The rows of this step, for a forward with those of other requests (see `Layers.steps`)."""
        rows = torch.arange(row, row + len(tokens)) + self.soft
        self.canvas.length = row + self.soft
        return Part(self.canvas, tokens, rows, rows + self.shift if self.shift else None, score_mod=self.score_mod)

    def __call__(self, tokens: Tensor, row: int) -> Tensor:
        return self.computer.steps([self.part(tokens, row)])[0]


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on accelerators and on CPUs with bfloat16 instructions, else float32."""
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16
