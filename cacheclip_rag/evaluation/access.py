"""What an evaluation asks of an engine beside answers: who it is, what it keeps, what that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

from ..chunks import Namespace
from ..engine import Engine
from ..errors import ConfigurationError
from ..library import Library
from ..methods import Method
from .company import Only
from .data import Item, prompt

_ENCODING = {"format", "prefix", "encoder", "tenant"}
"""What chunk KV depends on beside the model."""


def version() -> str:
    try:
        return installed("cacheclip-rag")
    except PackageNotFoundError:  # a checkout that was never installed
        return "0+unknown"


def identity(namespace: Namespace) -> str:
    """Sixteen hex digits for the model (weights, configuration, tokenizer, dtype), however chunks are encoded."""
    return Namespace({k: v for k, v in namespace.fields.items() if k not in _ENCODING}).digest[:16]


def ensure(engine: Engine, item: Item, method: Method) -> None:
    """Have the item's passages known as ``method`` wants them.

    Most methods encode them. Those that live on earlier prompts (exact reuse, harvested variants) get one: the same
    passages, the second half first, and another question. What they keep from the items before stays, too.
    """
    engine.ensure([passage.chunk for passage in item.passages], method=method)
    if not method.ahead:
        half = len(item.passages) // 2
        passages = (*item.passages[half:], *item.passages[:half])
        earlier = replace(item, passages=passages, question="What are these passages about?")
        engine.prefill(prompt(earlier, engine.backbone), method=method)


def fuse(engine: Engine, method: Method, neighbours: Mapping[str, Sequence[str]]) -> Method:
    """Have the passages fused with these neighbours, those left out that are too short to be chunks; the method that
    takes no other variants.

    Raises ConfigurationError when some could not be fused: a row must not be about something else than it says.
    """

    def known(text: str) -> bool:
        return engine.library.key(text) in engine.index

    engine.ensure(dict.fromkeys(other for company in neighbours.values() for other in company), method=method)
    wanted = {text: tuple(filter(known, company)) for text, company in neighbours.items() if known(text)}
    result = engine.fuse(wanted, method=method, variants=64)
    if result.skipped:
        raise ConfigurationError(f"not fused: {result.skipped[0]}")
    return replace(method, fit=Only(frozenset(wanted.values())))


def library(engine: Engine, method: Method) -> Library | None:
    """Where the chunks encoded as ``method`` wants them are kept; None for a method that keeps none ahead."""
    return engine.library_of(method) if method.ahead else None


def stored(library: Library | None, texts: Sequence[str]) -> tuple[int, int] | None:
    """Bytes and tokens of these chunks' KV, each chunk once; None where some of it is not kept."""
    if library is None:
        return None
    chunks = [library.get(key) for key in dict.fromkeys(map(library.key, texts))]
    whole = [chunk for chunk in chunks if chunk is not None]
    if len(whole) < len(chunks):
        return None
    return sum(chunk.nbytes for chunk in whole), sum(len(chunk) for chunk in whole)
