"""Between retrieval and the model, where the chunks and the question are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import Runnable, RunnableLambda, run_in_executor
from pydantic import ConfigDict, Field

from cacheclip_rag.frameworks import Handle, OnMiss, handle_of, prepare_retrieved

if TYPE_CHECKING:
    from cacheclip_rag.engine import Engine

    from .chat_models import ChatCacheClip


class CacheClipCompressor(BaseDocumentCompressor):
    """Starts loading the retrieved chunks' KV, tells the engine the question, and encodes what has no KV yet.

    It compresses nothing: it returns the documents untouched, and it never raises; without it answers come all the
    same, only later. For ``ContextualCompressionRetriever``; in a pipeline of compressors put it last, so that it sees
    the chunks that the model will see.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    on_miss: OnMiss = Field(
        default="background",
        description="Chunks without KV: encode them after the answer, before it, or not at all.",
    )
    handle: Handle = Field(exclude=True, repr=False)

    def __init__(self, llm: ChatCacheClip | Engine | Any = None, **fields: Any) -> None:
        """``llm``: the `ChatCacheClip` that will answer, or its engine. Raises TypeError for anything else."""
        if "handle" not in fields:
            fields["handle"] = handle_of(llm)
        super().__init__(**fields)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        _prepare(self.handle, documents, query, self.on_miss)
        return documents

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        return await run_in_executor(None, self.compress_documents, documents, query)


def cacheclip_warm(llm: ChatCacheClip | Engine, *, on_miss: OnMiss = "background") -> Runnable[Any, Any]:
    """`CacheClipCompressor` as a step of a chain: what goes in comes out.

    What goes in is a list of documents (``retriever | cacheclip_warm(llm)``), or a mapping with such a list under some
    key and, under ``input``, ``question`` or ``query``, the question. Raises TypeError for a wrong ``llm``.
    """
    handle = handle_of(llm)

    def step(value: Any) -> Any:
        _prepare(handle, _documents(value), _question(value), on_miss)
        return value

    async def astep(value: Any) -> Any:
        return await run_in_executor(None, step, value)

    return RunnableLambda(step, astep, name="cacheclip_warm")


def _prepare(handle: Handle, documents: Sequence[Document], question: str | None, on_miss: OnMiss) -> None:
    """Never raises."""
    prepare_retrieved(handle, [document.page_content for document in documents], question, on_miss)


def _documents(value: Any) -> list[Document]:
    if isinstance(value, Mapping):
        return [document for item in value.values() if isinstance(item, list) for document in _documents(item)]
    return [item for item in value if isinstance(item, Document)] if isinstance(value, (list, tuple)) else []


def _question(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return None
    return next((value[name] for name in ("input", "question", "query") if isinstance(value.get(name), str)), None)
