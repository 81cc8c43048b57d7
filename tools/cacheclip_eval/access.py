"""What an evaluation needs of an engine besides answers: model identity, stored chunks, and their size in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

from cacheclip_rag.chunks import ChunkKV, Namespace, canonical
from cacheclip_rag.engine import Engine
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.kv.fit import Fit, Nearest
from cacheclip_rag.kv.library import Library
from cacheclip_rag.methods import Method
from cacheclip_rag.store.int8 import pack

from .contexts import FusionPlan, Only
from .data import Item, prompt

_VARIANTS = 64
"""Variants kept of a chunk: enough for all systems that share the engine."""

_ENCODING = {"format", "prefix", "encoder", "tenant", "kv_dtype"}
"""Fields of a namespace that do not describe the model."""


def version() -> str:
    """The installed version of the library."""
    try:
        return installed("cacheclip-rag")
    except PackageNotFoundError:  # a checkout that was never installed
        return "0+unknown"


def identity(namespace: Namespace) -> str:
    """Sixteen hex digits that identify the model (weights, configuration, tokenizer, dtype), whatever the encoding."""
    return Namespace({k: v for k, v in namespace.fields.items() if k not in _ENCODING}).digest[:16]


def ensure(engine: Engine, item: Item, method: Method) -> None:
    """Make the item's passages available for ``method``.

    Most methods encode them. Methods that reuse earlier prompts (prefix caching, harvested variants) get one: the same
    passages, the second half first, with another question. What they kept of earlier items stays as well.
    """
    engine.ensure([passage.chunk for passage in item.passages], method=method)
    if not method.ahead:
        half = len(item.passages) // 2
        passages = (*item.passages[half:], *item.passages[:half])
        earlier = replace(item, passages=passages, question="What are these passages about?")
        engine.prefill(prompt(earlier, engine.backbone), method=method)


def fuse(engine: Engine, method: Method, plan: FusionPlan) -> Method:
    """Fuse passages as planned; returns the method restricted to these variants. Passages too short for a chunk are
    left out.

    Raises `ConfigurationError` if some could not be fused, so that a row's label is always true.
    """

    def known(texts: Iterable[str]) -> tuple[str, ...]:
        return tuple(text for text in dict.fromkeys(texts) if engine.library.key(text) in engine.index)

    groups = [*plan.neighbours.values(), *plan.sequences]
    engine.ensure(dict.fromkeys(text for group in groups for text in group), method=method)
    neighbours = {text: known(context) for text, context in plan.neighbours.items() if known([text])}
    sequences = [known(texts) for texts in plan.sequences]
    done = engine.fuse(neighbours, method=method, variants=_VARIANTS)
    done.skipped += engine.fuse_in_order(sequences, method=method, variants=_VARIANTS).skipped
    if done.skipped:
        raise ConfigurationError(f"not fused: {done.skipped[0]}")
    kept = engine.library_of(method)
    pairs = [(canonical(text), _others(text, context)) for text, context in neighbours.items()]
    for texts in (_others("", texts) for texts in sequences):
        pairs += [(text, texts[:number]) for number, text in enumerate(texts)]
    for text, context in pairs:
        if context and not any(kept.key(text, context, in_sequence) in kept.store for in_sequence in (True, False)):
            raise ConfigurationError(
                f"not fused with all of its context: {text[:40]!r}; if that exceeds the model's context length, ask "
                "for fewer neighbours"
            )
    contexts = {context for _, context in pairs if context}
    return replace(method, fit=Only(frozenset(contexts), method.fit or Nearest()))


def _others(text: str, texts: Iterable[str]) -> tuple[str, ...]:
    """The canonical texts other than ``text``, each once, as in the context of a variant."""
    return tuple(other for other in dict.fromkeys(map(canonical, texts)) if other != canonical(text))


def written(engine: Engine, method: Method) -> int:
    """Bytes that the method's prefix cache has written so far; 0 for methods without one."""
    cache = engine.prefix_cache_of(method)
    return 0 if cache is None else cache.written


def left(engine: Engine, method: Method, texts: Sequence[str], since: int) -> tuple[int, int] | None:
    """Like `stored`, for a method that reuses earlier prompts.

    For harvested chunks, the bytes of all their variants. Prefix caching keeps prompts and not chunks, so it counts
    what was `written` ``since``.
    """
    names = {engine.library.key(text): text for text in texts}
    tokens = sum(len(engine.backbone.tokenise(canonical(text), plain=True)) for text in names.values())
    if method.prefix_cache is not None:
        return written(engine, method) - since, tokens
    variants = [engine.variants_of(method, text) for text in names.values()]
    return (sum(v.kv.nbytes for each in variants for v in each), tokens) if all(variants) else None


def stored(library: Library, texts: Sequence[str], fit: Fit | None = None) -> tuple[int, int] | None:
    """The bytes of these chunks' KV, including the variants that ``fit`` may choose, and their tokens, each chunk once.
    None if some chunk is not stored.
    """
    alone = _kept(library, dict.fromkeys(map(library.key, texts)))
    if None in alone:
        return None
    contexts = fit.these if isinstance(fit, Only) else ()
    keys = {
        library.key(text, context, in_sequence)
        for text in texts
        for context in contexts
        for in_sequence in (True, False)
    }
    held = [chunk for chunk in alone + _kept(library, keys) if chunk is not None]
    return sum(chunk.nbytes for chunk in held), sum(len(chunk) for chunk in alone if chunk is not None)


def _kept(library: Library, keys: Iterable[str]) -> list[ChunkKV | None]:
    chunks = [library.get(key) if key in library.store else None for key in keys]
    return [chunk if chunk is None or library.lossless else pack(chunk) for chunk in chunks]
