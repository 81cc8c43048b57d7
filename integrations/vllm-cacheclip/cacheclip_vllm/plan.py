"""What the scheduler decides about a request and the worker carries out: a `Plan`, and the `Done` that comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cacheclip_rag import methods
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.kv.encode import Encoder
from cacheclip_rag.methods import Method, check_ratio
from cacheclip_rag.methods.attend.base import Plain
from cacheclip_rag.methods.recompute.carry import Carry
from cacheclip_rag.methods.recompute.once import Once
from cacheclip_rag.methods.select.cacheblend import KeyDeviation
from cacheclip_rag.methods.select.query_guided import QueryGuided
from cacheclip_rag.prompt import Layout, Span

FIELD = "cacheclip"
"""The field of ``kv_transfer_params`` that holds our options and our report."""


@dataclass(frozen=True)
class Options:
    """What a request asks for. ``sources``: whether the report says of each token, in order, where its KV came from.
    ``tenant`` and ``encode`` are set by the server, never by its clients.
    """

    method: Method
    ratio: float
    reuse: bool = True
    sources: bool = False
    tenant: str = ""
    encode: Mapping[str, Any] | None = None


def options(given: Any, default: Method, auxiliary: bool = False) -> Options:
    """The options of a request, checked. Raises `ConfigurationError` that says what is valid.

    A method that cannot be run inside vLLM is refused by name, with the reason. ``auxiliary``: see `refused`.
    """
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ConfigurationError(f'"{FIELD}" holds options by name, as in {{"recompute_ratio": 0.2}}, not {given!r}')
    if unknown := set(given) - {"method", "recompute_ratio", "reuse", "report", "sources", "tenant", "encode", "proof"}:
        raise ConfigurationError(
            f"unknown option {sorted(unknown)[0]!r}; there are: method, recompute_ratio, reuse, report"
        )
    for name, kind in (("method", str), ("reuse", bool), ("report", bool), ("sources", bool), ("tenant", str)):
        if name in given and not isinstance(given[name], kind):
            raise ConfigurationError(f"{name} is a {kind.__name__}, not {given[name]!r}")
    method = methods.resolve(given["method"]) if "method" in given else default
    if method.encode not in (methods.METHODS[method.name].encode, default.encode):
        raise ConfigurationError(
            f'"{given["method"]}" would encode chunks in a way of its own: start the server with it'
        )
    if (reason := refused(method, auxiliary)) is not None:
        raise ConfigurationError(f'method "{method.name}" cannot be used inside vLLM: {reason}')
    if "recompute_ratio" in given:  # a ratio that somebody names is kept, however well contexts fit
        method = dataclasses.replace(method, fitted_ratio=None)
    ratio = check_ratio(given.get("recompute_ratio", method.recompute_ratio))
    return Options(
        method,
        ratio,
        given.get("reuse", True),
        given.get("sources", False),
        given.get("tenant", ""),
        given.get("encode"),
    )


def refused(method: Method, auxiliary: bool = False) -> str | None:
    """Why a method cannot be used inside vLLM, or None. ``auxiliary``: whether workers have an auxiliary model."""
    if getattr(method.encode, "trained", None) is not None:
        return "its soft tokens have rows beside the prompt's tokens, and vLLM's rows are the prompt's tokens"
    if getattr(method.encode, "adapter", None) is not None:
        return "the weights are the server's: start it with a model that the adapter is merged into"
    if method.strategy == "prefix":
        return "vLLM has a prefix cache of its own"
    if method.strategy == "full":
        return 'leave vLLM alone with "reuse": false'
    if method.strategy == "harvest":
        return "it keeps and continues the residual stream, which vLLM's models do not hand out"
    if not isinstance(method.attend, Plain) or method.positions != "global":
        return "it changes how decoding attends, and decoding is vLLM's"
    if not isinstance(method.recompute, (Once, Carry)):
        return "it continues from a residual stream, which vLLM's models do not hand out"
    if method.reorder:
        return "reordering changes the prompt, and the scheduler has its token ids only"
    if method.select.needs_auxiliary and not auxiliary:
        return "no auxiliary model was configured: start the server with --auxiliary smollm2-135m-instruct"
    return None


def needs_every_key(method: Method) -> bool:
    """Whether the method's selector looks at keys that are in no chunk, such as a system prompt's."""
    return isinstance(method.select, QueryGuided) and method.select.normalise == "row"


@dataclass(frozen=True)
class Place:
    """A known chunk in the prompt: its canonical ``text``, the ``key`` of the KV to be used, or why it is ``missing``.

    ``runs``: ``(row, offset, length)`` of the tokens that can take their KV from it.
    """

    text: str
    key: str | None
    runs: tuple[tuple[int, int, int], ...]
    missing: str | None = None


@dataclass(frozen=True)
class Encode:
    """A chunk to be computed: its ``text``, its first row ``start``, and the texts of its stored ``context``."""

    text: str
    start: int
    context: tuple[str, ...] = ()


@dataclass
class Plan:
    """How one request's rows are filled, except for its last one, which vLLM computes.

    ``prefix``: rows from 0 on that hold the encode prefix; ``head``: rows before it are exact, so that a shared block
    may hold them; ``shared``: rows before it have KV that later prompts with the same ``salt`` may use; ``first``: rows
    before it are there already; ``question``: the question's rows; ``spare``: blocks
    behind the request's own ``blocks``, for a copy of the question; ``local``: tokens that vLLM's prefix cache had when
    it was asked last; ``barred``: rows before `first` are only computed in this step, so that it cannot be filled.
    """

    request: str
    ids: np.ndarray
    tenant: str
    method: Method
    ratio: float
    prefix: int
    places: list[Place]
    question: np.ndarray
    question_ids: np.ndarray
    encode: Encode | None = None
    sources: bool = False
    head: int = 0
    shared: int = 0
    salt: str = ""
    first: int = 0
    blocks: list[int] = field(default_factory=list)
    spare: list[int] = field(default_factory=list)
    filled: bool = False
    local: int = 0
    barred: bool = False

    def layout(self) -> Layout:
        """The prompt by tokens, as methods see it; spans are rows instead of characters."""
        count = len(self.ids)
        chunk, token = np.full(count, -1, dtype=np.int64), np.full(count, -1, dtype=np.int64)
        edge = np.zeros(count, dtype=bool)
        spans = []
        for number, place in enumerate(self.places):
            start, end = place.runs[0][0], place.runs[-1][0] + place.runs[-1][2]
            spans.append(Span(start, end, place.key or "", place.runs[0][1]))
            if place.key is None:
                continue
            edge[start:end] = True
            for row, offset, length in place.runs:
                held = slice(row, row + length)
                chunk[held], token[held], edge[held] = number, np.arange(offset, offset + length), False
        rows = torch.arange(count)
        return Layout(
            "",
            torch.from_numpy(self.ids),
            torch.stack([rows, rows + 1], dim=1),
            tuple(spans),
            torch.from_numpy(chunk),
            torch.from_numpy(token),
            torch.from_numpy(edge),
        )

    @property
    def copies_question(self) -> bool:
        """Whether selection may need a copy of the question behind the prompt, since a chunk follows it."""
        last = max((place.runs[-1][0] for place in self.places if place.key is not None), default=-1)
        return self.encode is None and (not len(self.question) or int(self.question[0]) < last)

    @property
    def cost(self) -> int:
        """The rows of its largest pass, at most."""
        held = sum(length for place in self.places if place.key is not None for _, _, length in place.runs)
        ratio = max(self.ratio, self.method.fitted_ratio or 0.0)
        if ratio and isinstance(self.method.select, KeyDeviation):  # compares with a forward over the whole prompt
            ratio = 1.0
        return len(self.ids) - held + int(ratio * held)

    @property
    def keys(self) -> dict[str, int | None]:
        """The keys of the stored chunks that the worker must have, each with how many tokens are taken from it; None
        where it is needed however long loading it takes, since a chunk is computed behind all of its context.
        """
        keys: dict[str, int | None] = {}
        for place in self.places:
            if place.key is not None:
                tokens = (keys.get(place.key) or 0) + sum(length for _, _, length in place.runs)
                keys[place.key] = None if self.encode is not None else tokens
        return keys


@dataclass(frozen=True)
class Load:
    """The chunks of one request that workers are to load: `Plan.keys`, of a tenant and an encoding."""

    request: str
    tenant: str
    encoder: Encoder
    keys: Mapping[str, int | None]


@dataclass
class Done:
    """What became of a plan: the report's numbers, or why it ``failed``."""

    report: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None
