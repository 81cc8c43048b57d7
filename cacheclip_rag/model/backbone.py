"""A model of transformers with all that the engine needs of it: load, prefill its own way, generate."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from ..compute import Hook, Part, ScoreMod
from ..deprecation import renamed_attribute
from ..errors import ConfigurationError, NotComposable, WeightsError
from ..prompt import Tokens
from .attention import AUTO
from .canvas import Canvas
from .composability import obstacle_of
from .fingerprint import fingerprint
from .inference import inference, inferring
from .layers import Layers, cache_argument
from .rotary import Rotary
from .threads import fit_threads
from .tokenizer import Texts

_ONE_ANSWER = {"num_beams": 1, "num_return_sequences": 1, "stop_strings": None}
"""What the model's own generation config may say otherwise, for loops that are not ours."""


class Backbone:
    """A causal language model of transformers with its tokenizer, and the few operations the engine needs of them.

    ``computer`` computes rows (see `Layers`), ``texts`` makes tokens of text and prompts of messages; what is asked of
    either most often stands here, too. Thread-safe in use: a forward keeps its state in its own `Canvas`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, attention: str = AUTO) -> None:
        """The model's attention becomes ours, which takes one text at a time and no padding: load another model for
        batches. Setting it to something else afterwards makes every forward here raise `ConfigurationError`.
        """
        self.texts = Texts(tokenizer)
        self.computer = Layers(model, attention=attention)
        self.model, self.tokenizer, self.config = self.computer.model, tokenizer, self.computer.config
        self.device, self.dtype, self.attention = self.computer.device, self.computer.dtype, self.computer.attention
        self.layers, self.kv_heads, self.head_dim = (
            self.computer.layers,
            self.computer.kv_heads,
            self.computer.head_dim,
        )
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
    ) -> Backbone:
        """Load from a folder. ``dtype="auto"`` takes bfloat16 where the hardware multiplies it natively, else float32;
        ``attention="auto"`` takes the Triton kernel where there is a GPU on which it runs, else PyTorch's attention.
        PyTorch's threads are no more, afterwards, than this process may use CPUs (see `threads`).

        Raises `WeightsError` when the folder holds no causal language model with a fast tokenizer.
        """
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
        return cls(model.to(device), tokenizer, attention=attention)

    # ---- texts ----------------------------------------------------------------------------------------------------

    def tokenise(self, text: str, plain: bool = False) -> Tokens:
        """Token ids without added special tokens. ``plain``: control tokens in the text stay ordinary characters."""
        return self.texts.tokenise(text, plain)

    def tokenise_prompt(self, prompt: str, documents: Sequence[tuple[int, int]] = ()) -> Tokens:
        """A whole prompt's tokens. ``documents``: character spans in which control tokens stay text."""
        return self.texts.tokenise_prompt(prompt, documents)

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The prompt for chat ``messages``, ready for the assistant's turn; plain texts where there is no template."""
        return self.texts.chat(messages, **options)

    def shared_prefix(self) -> str:
        """What stands before a user's text in this model's chat template: the prefix chunks are encoded behind."""
        return self.texts.shared_prefix()

    @property
    def control_tokens(self) -> list[str]:
        """The texts that the tokenizer reads as control tokens."""
        return self.texts.control_tokens

    @property
    def opening(self) -> str:
        """What stands before the user's text in this model's chat template; nothing where there is none."""
        return self.texts.opening

    @property
    def closing(self) -> str:
        """What stands behind the user's text in this model's chat template, up to where the answer begins."""
        return self.texts.closing

    # ---- forward --------------------------------------------------------------------------------------------------

    @property
    def context_length(self) -> int:
        """The longest prompt with its answer, in tokens."""
        return self.computer.context_length

    @context_length.setter
    def context_length(self, length: int) -> None:
        self.computer.context_length = length

    window = renamed_attribute("window", "context_length")

    @property
    def full_layers(self) -> list[int]:
        """The layers that attend to the whole context; all of them where every layer has a sliding window."""
        return self.computer.full_layers

    @property
    def sliding_window(self) -> int | None:
        """How far the `full_layers` see, in tokens; None for everything."""
        return self.computer.sliding_window

    def canvas(self, capacity: int, layers: int | None = None) -> Canvas:
        """An empty canvas; of fewer ``layers`` for a forward that does not go deeper."""
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
        """Compute the tokens ``x [S]`` at canvas ``rows [S]`` (strictly increasing); their KV is written before it is
        attended to.

        This one primitive is full prefill (all rows on an empty canvas), selective recompute (scattered rows over
        placed chunks) and a decoding step (one row). Returns the last ``logits`` rows' logits ``[logits, V]`` in
        float32, or None for ``logits=0``, which spares the lm head, and where a hook raised `StopForward`.
        ``depth`` runs the first layers only (no logits). ``first``: start at this layer, from the residual stream
        ``x [S, d]`` that `advance` returned. ``positions [S]`` are the RoPE positions where they differ from the slots;
        ``floors [S]`` the first slots that the rows may see, where several texts share the canvas; ``hooks`` and
        ``score_mod`` are those of `compute.Part`.
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
        """The layers ``[first, last)`` only: returns the residual stream ``[S, d]`` that enters layer ``last``.

        ``x`` is ``ids [S]`` for ``first=0``, else the residual stream entering layer ``first``; other arguments as in
        `forward`. Raises `NotComposable` for a model that cannot be run in stages.
        """
        return self.computer.advance_one(Part(canvas, x, rows, positions, hooks, score_mod), first, last, floors)

    # ---- decoding -------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt_ids: Tensor,
        logits: Tensor,
        step: Callable[[Tensor, int], Tensor],
        *,
        seed: int | None = None,
        **options: Any,
    ) -> Iterator[int]:
        """Decode after a prefill: yields token ids until transformers says stop.

        ``prompt_ids [T]``; the prompt's last ``logits [1, V]``; ``step(id [1], row)`` computes the next ones (see
        `on_canvas`). ``options`` are those of ``model.generate``, which prepares logits processors and stopping
        criteria; the loop is ours (its ``custom_generate`` seam), because the first token needs no forward here and the
        caller may pause or stop between any two. Closing the iterator ends it. ``seed``: sample with a generator of its
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
            scores, row = logits, len(prompt_ids)
            while True:
                with inference():
                    scores = logits_processor(input_ids, scores)
                    if generation_config.do_sample:
                        token = torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=random)
                    else:
                        token = scores.argmax(dim=-1, keepdim=True)
                    input_ids = torch.cat([input_ids, token.to(input_ids.device)], dim=-1)
                    done = bool(stopping_criteria(input_ids, None).all())
                yield int(token)
                if done:
                    return
                scores, row = step(token[0], row), row + 1

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

    def check_options(self, names: Iterable[str]) -> None:
        """Raises ConfigurationError for names that are no options of ``model.generate``."""
        config = self.model.generation_config
        known = {*vars(config), *inspect.signature(self.model.generate).parameters} - {"self", "kwargs"}
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, known | {"max_new_tokens"}, n=1)
                hint = f'; did you mean "{close[0]}"?' if close else ""
                raise ConfigurationError(f'"{name}" is no option of a request or of transformers\' generate{hint}')

    def ends(self, given: int | Sequence[int] | None = None) -> frozenset[int]:
        """The tokens that end an answer: those ``given``, else the model's own."""
        ids = self.model.generation_config.eos_token_id if given is None else given
        return frozenset() if ids is None else frozenset(torch.as_tensor(ids).flatten().tolist())

    def on_canvas(
        self, canvas: Canvas, *, shift: int = 0, score_mod: ScoreMod | None = None
    ) -> Callable[[Tensor, int], Tensor]:
        """The decoding step of `generate` that appends to ``canvas``: ``step(ids [n], row)`` gives logits ``[n, V]``.

        Positions are the rows plus ``shift``.
        """

        def step(tokens: Tensor, row: int) -> Tensor:
            rows = torch.arange(row, row + len(tokens))
            positions = rows + shift if shift else None
            part = Part(canvas, tokens, rows, positions, score_mod=score_mod)
            logits = self.computer.forward_one(part, logits=len(tokens))
            assert logits is not None
            return logits

        return step

    @inferring
    def native_prefill(self, ids: Tensor) -> tuple[Tensor, Callable[[Tensor, int], Tensor]]:
        """Full prefill with transformers' own cache and attention, for models that cannot be composed.

        Returns the last ``logits [1, V]`` and the decoding step of `generate`.
        """
        output = self.model(input_ids=ids.to(self.device)[None], use_cache=True, logits_to_keep=1)
        name = cache_argument(self.model)
        cache = getattr(output, name)

        @inferring
        def step(tokens: Tensor, row: int) -> Tensor:
            ids = tokens.to(self.device)[None]
            positions = torch.arange(row, row + len(tokens), device=self.device)[None]
            output = self.model(input_ids=ids, position_ids=positions, use_cache=True, **{name: cache})
            return output.logits[0].float()

        return output.logits[0].float(), step

    @inferring
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
        if self.obstacle is not None or self.computer.rotary is None:
            raise NotComposable(self.obstacle or "the model has no rotation that moves its keys")
        return self.computer.rotary

    def fingerprint(self) -> dict[str, str]:
        """What identifies this model for stored KV (see `fingerprint.fingerprint`)."""
        return fingerprint(self.model, self.config, self.texts.definition, self.dtype)


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on accelerators and on CPUs with bfloat16 instructions, else float32."""
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16
