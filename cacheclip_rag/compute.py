"""What methods need from a model: compute some rows of a prompt over its KV, hook a layer before it attends, write KV.

Selection, recompute and attention scores are written against these protocols and do not depend on transformers.
`cacheclip_rag.model` implements them for models of transformers. An engine with paged KV can implement them as well: a
run of rows ``[a, b)`` is a sequence of query length ``b - a`` and context length ``b``, whose bottom-right causal mask
is exactly ``slot <= row``. Such an engine cannot read its cache back or modify scores. Only `Workspace.placed`, whose
tensors can be kept beside the cache, and `ScoreMod` ask for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from .chunks import ChunkKV

Rotation = Callable[[Tensor, int], Tensor]
"""``rotation(keys [n, Hk, D] float32, layer)``: moves the RoPE position of one layer's keys, each by its own offset."""


class StopForward(Exception):
    """Raised by a hook to end the forward early; there are no logits then."""


class Workspace(Protocol):
    """One request's KV cache: ``capacity`` slots per layer, ``length`` of them used. Row i of the prompt is slot i."""

    length: int

    @property
    def capacity(self) -> int: ...

    def place(self, chunk: ChunkKV, tokens: slice, row: int, position: int | None = None) -> None:
        """Copy the KV of ``chunk``'s ``tokens`` to the slots from ``row`` on, rotated to ``position`` (or row)."""

    def write(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Copy KV ``[L, Hk, n, D]`` of all layers, already at its position, to the slots from ``row`` on."""

    def write_layer(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Copy KV ``[n, Hk, D]`` of one layer to the slots ``rows [n]``."""

    def placed(self, layer: int) -> tuple[Tensor, Tensor]:
        """The current keys and values ``[capacity, Hk, D]`` of one layer, read-only."""


@dataclass(frozen=True, eq=False)
class LayerInput:
    """What one layer is about to attend with. The KV of these rows is not written to the workspace yet.

    ``rows [S]`` int64; ``query [S, H, D]``, ``key`` and ``value [S, Hk, D]``, queries and keys rotated; ``scaling``:
    the factor on query-key products.
    """

    layer: int
    rows: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    workspace: Workspace


class Hook(Protocol):
    """Called in each of ``layers`` (None: all layers) of a forward, before its rows attend.

    It may write other rows of that layer, and may raise `StopForward`.
    """

    @property
    def layers(self) -> Container[int] | None: ...

    def __call__(self, at: LayerInput) -> None: ...


class ScoreMod(Protocol):
    """A score modification (FlexAttention's term): turns attention logits into probabilities from ``first_layer`` on,
    in place of a plain softmax.
    """

    @property
    def first_layer(self) -> int: ...

    def prepare(self, blocks: Iterator[tuple[Tensor, Tensor]]) -> Any:
        """Called once per layer and forward, before `probabilities`, with all ``(logits, rows)``, block by block.

        The return value is passed to `probabilities` as ``plan``.
        """

    def probabilities(self, logits: Tensor, rows: Tensor, plan: Any) -> Tensor:
        """Attention probabilities ``[Hk, G, R, N]`` float32 from ``logits`` of that shape, -inf where masked.

        ``rows [R]`` int64 are the slots of the queries.
        """


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of one request in a forward.

    ``x``: token ids ``[S]`` int64, or the residual stream ``[S, d]`` that enters the first layer to be run;
    ``rows [S]`` int64, strictly increasing; ``positions [S]`` int64: the RoPE positions where they are not the rows.
    """

    workspace: Workspace
    x: Tensor
    rows: Tensor
    positions: Tensor | None = None
    hooks: Sequence[Hook] = ()
    score_mod: ScoreMod | None = None


class Computer(Protocol):
    """A causal language model that can compute any subset of a prompt's rows.

    A row attends to the slots up to its own. Its KV is written before it attends.
    """

    layers: int
    device: torch.device

    @property
    def windows(self) -> Sequence[int | None]:
        """Each layer's sliding window in tokens; None for a layer with full attention."""

    @property
    def full_layers(self) -> list[int]:
        """The layers with full attention; all layers if every one has a sliding window."""

    def workspace(self, capacity: int, layers: int | None = None) -> Workspace:
        """An empty workspace of ``capacity`` slots. ``layers``: only the first ones, for forwards that go no deeper."""

    def forward(
        self, parts: Sequence[Part], *, first: int = 0, depth: int | None = None, logits: int = 1
    ) -> list[Tensor | None]:
        """Run the layers ``[first, depth)`` (None: to the last) over the rows of each part.

        Returns, for each part, the logits ``[logits, V]`` float32 of its last ``logits`` rows. None with ``logits=0``,
        if the forward does not reach the last layer, and if a hook stopped it.
        """

    def advance(self, parts: Sequence[Part], first: int, last: int) -> list[Tensor]:
        """Run the layers ``[first, last)`` and return the residual stream ``[S, d]`` that enters layer ``last``.

        Raises `NotComposable` for a model that cannot be run in stages.
        """

    def rotation(self, by: Tensor) -> Rotation:
        """The rotation that moves one layer's keys, token j by ``by[j]`` positions (``by [n]`` int64, may be
        negative).
        """

    def over_ranks(self, scores: Tensor) -> Tensor:
        """The mean of ``scores`` over the processes that each hold some of the heads; as they are for one process."""


def visible(rows: Tensor, keys: int, window: int | None = None, floors: Tensor | None = None) -> Tensor:
    """The causal mask of scattered rows, ``[S, N]`` bool, true where a row may attend.

    ``rows [S]`` int64 slots; ``keys`` = N; ``window`` = a sliding window's width in tokens, as transformers counts it
    (a token sees itself and the ``window - 1`` tokens before it); ``floors [S]`` int64, the first slot each row may
    see.

    This is *not* a bottom-right aligned triangle. Aligning scattered rows to the end of the keys lets early rows attend
    to the future, a known bug in two public implementations of selective recompute.
    """
    slots = torch.arange(keys, device=rows.device)
    mask = slots <= rows[:, None]
    if window is not None:
        mask &= slots > rows[:, None] - window
    if floors is not None:
        mask &= slots >= floors[:, None]
    return mask


Function = TypeVar("Function", bound=Callable[..., Any])


def on_cpu(function: Function) -> Function:
    """Tensors that ``function`` makes without saying where live on the CPU, whatever `torch.set_default_device` says.

    Rows, positions and token ids do; what a model computes on says its device.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if (
            torch.get_default_device().type == "cpu"
        ):  # as nearly always: the context below costs time at every operation
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return cast(Function, call)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. From host memory to a GPU through pinned memory, so that nobody waits for the copy."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
