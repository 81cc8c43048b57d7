"""Questions about an ingested folder, answered piece by piece, each with its report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

from llama_index.core.base.response.schema import StreamingResponse
from llama_index.core.embeddings import BaseEmbedding
from llama_index.postprocessor.cacheclip import CacheClipPostprocessor

from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.report import Report

from .folder import Library, text_of


@dataclass(frozen=True)
class Reply:
    """The answer, what it was made from (``source`` names, best first), and what happened to the prompt's tokens."""

    text: str
    sources: list[str]
    report: Report
    full_prefill: str | None = None
    """The answer without reuse, where it was asked for."""


class Session:
    """An open model and an open library. Questions are independent of each other."""

    def __init__(
        self,
        library: Library,
        embedding: BaseEmbedding,
        *,
        top_k: int = 6,
        ratio: float | None = None,
        tokens: int = 128,
        method: str | None = None,
    ) -> None:
        """Raises what opening the model raises, `ConfigurationError` for a wrong ratio or method."""
        chosen = {} if method is None else {"method": method}
        self._llm = library.llm(recompute_ratio=ratio, max_new_tokens=tokens, **chosen)
        self._tokens = tokens
        self._engine = self._llm.engine  # opened now, not at the first question
        self._queries = library.index(embedding).as_query_engine(
            llm=self._llm,
            similarity_top_k=top_k,
            streaming=True,
            node_postprocessors=[CacheClipPostprocessor(self._llm)],
        )

    def ask(self, question: str, show: Callable[[str], None] = lambda _: None, compare: bool = False) -> Reply:
        """Answer, handing pieces to ``show`` as they come. Raises `ConfigurationError` where nothing was retrieved.

        With ``compare``, the same prompt is prefilled in full afterwards and answered once more, so that the answer
        and the report's time have something measured to stand against.
        """
        response = self._queries.query(question)
        if not isinstance(response, StreamingResponse):  # nothing was retrieved, so the model was not asked
            raise ConfigurationError("the library is empty: run `cacheclip ingest FOLDER` again")
        text = ""
        for piece in cast("Iterator[str]", response.response_gen):
            text += piece
            show(piece)
        report = self._llm.last_report()
        assert report is not None
        names = {}
        for found in response.source_nodes:
            page = found.metadata.get("page")
            name = found.metadata["source"] + (f", page {page}" if page else "")
            names[self._engine.library.key(text_of(found.node))] = name
        report.sources = names
        full = None
        if compare and report.token_sources is not None:
            prompt = report.token_sources.prompt
            answer = self._engine.generate(prompt, method="full", max_new_tokens=self._tokens)
            full, report.full_prefill = answer.text.strip(), answer.report.ttft
        return Reply(text.strip(), list(dict.fromkeys(names.values())), report, full)

    def close(self) -> None:
        """Stop background work and let the model's memory go."""
        self._llm.close()
