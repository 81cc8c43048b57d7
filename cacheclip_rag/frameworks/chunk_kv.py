"""Encoding chunks at ingestion, and getting their KV ready after retrieval."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, TypeAlias

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from ..engine import Engine
    from .engines import EngineHandle

log = logging.getLogger("cacheclip_rag")

OnMiss: TypeAlias = Literal["background", "encode", "ignore"]
"""Retrieved chunks without KV: encode them after the answer, before it, or not at all."""


def encode(engine: Engine, texts: Iterable[str], show_progress: bool = True) -> int:
    """Keep the KV of these chunks, with a progress bar once it takes over a second. How many were encoded now.

    What is finished when it is interrupted need not be done again.
    """
    texts = list(dict.fromkeys(texts))
    bar = tqdm(total=len(texts), desc="KV of chunks", unit="chunk", delay=1, disable=not show_progress)

    def progress(done: int) -> None:
        bar.update(done - bar.n)

    with bar:
        result = engine.ensure(texts, progress=progress)
    log.info("%d of %d chunks encoded now, %d left out", result.encoded, len(texts), len(result.skipped))
    for number, (_, reason) in enumerate(result.skipped, start=1):  # no text is logged
        log.debug("no KV of %d of %d chunks: %s", number, len(result.skipped), reason)
    return result.encoded


def prepare_retrieved(handle: EngineHandle, texts: Iterable[str], question: str | None, on_miss: OnMiss) -> None:
    """As `warm`, between a retriever and a model that answers without it, too, only later: never raises."""
    try:
        warm(handle.engine, texts, question or None, on_miss)
    except Exception:
        log.exception("retrieved chunks not prepared; the model prefills what it finds no KV for")


def warm(engine: Engine, texts: Iterable[str], question: str | None, on_miss: OnMiss) -> None:
    """Tell the engine which chunks and which question are coming, and see to the chunks it has no KV of."""
    from ..chunks import MIN_CHARS, canonical

    texts = [text for text in dict.fromkeys(texts) if len(canonical(text)) >= MIN_CHARS]
    engine.hint(texts, question)
    if on_miss == "ignore":
        return
    missing = [text for text in texts if not engine.knows(text)]
    if missing and on_miss == "background":
        engine.ensure_later(missing)
    elif missing:
        engine.ensure(missing)
