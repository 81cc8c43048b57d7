"""The last step of an ingestion pipeline: read every chunk once and keep its KV."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_index.core import Settings
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.embeddings import BaseEmbedding, resolve_embed_model
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent

from cacheclip_rag.frameworks import Fuser, Handle, handle_of

from .copies import restore

if TYPE_CHECKING:
    from cacheclip_rag.engine import Engine

    from .base import CacheClipLLM

log = logging.getLogger("cacheclip_rag")


class CacheClipTransform(TransformComponent):
    """Encodes each node's text, as the LLM will see it, and returns the nodes as they came.

    Put it after splitters and metadata extractors. It never raises: ingestion with upserts has deleted the old vectors
    by then, and a chunk without KV only costs time. In a worker process (``num_workers``) it leaves the work to
    `CacheClipPostprocessor` rather than load a model per worker.

    With ``fuse=10`` every chunk is fused with the ten others most like it as well, of all that the engine knows, for
    methods that take fused variants (``method="auto"``, ``"fusionrag"``), at twice the cost. How alike they are is told
    by ``embed_model``, or else by ``Settings.embed_model``, which is not asked for nodes that come with an embedding
    (put it before this step). Leave ``fuse`` out where documents must not colour one another's KV; collections that
    must not, of which only some are fused, are of different tenants (``CacheClipLLM(tenant=...)``).

    Example:
        ``IngestionPipeline(transformations=[SentenceSplitter(), embed_model, CacheClipTransform(llm)])``

    """

    fingerprint: str = Field(description="Identifies the model's KV; part of the ingestion cache's key.")
    show_progress: bool = Field(default=True, exclude=True, description="A progress bar, once it takes over a second.")

    fuse: int = Field(default=0, ge=0, description="How many similar chunks each is fused with; 0 for none.")

    _handle: Handle = PrivateAttr()
    _fuser: Fuser | None = PrivateAttr(default=None)
    _embedded_before: bool = PrivateAttr(default=False)
    _name: str = PrivateAttr(default_factory=lambda: uuid.uuid4().hex)

    def __init__(
        self, llm: CacheClipLLM | Engine, *, embed_model: BaseEmbedding | str | None = None, **fields: Any
    ) -> None:
        """``llm`` is loaded now, since the fingerprint depends on its weights. ``embed_model``: as LlamaIndex takes it,
        ``"local:..."`` included. Raises what opening the model raises, and ValueError for no embedding model.
        """
        handle = handle_of(llm)
        super().__init__(**{"fingerprint": handle.kv.fingerprint, **fields})
        self._handle = handle
        if self.fuse:
            handle.check_fusing(self.fuse)
            self._fuser = Fuser(self.fuse, _Embed(_embedding_model(embed_model)))
            self._embedded_before = embed_model is None

    @classmethod
    def class_name(cls) -> str:
        return "CacheClipTransform"

    @property
    def handle(self) -> Handle:
        """What stands for the engine, whether it is open or not, or for the server."""
        return self._handle

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        try:
            kv = self._handle.peek_kv() if self._handle.travelled else self._handle.kv
            if kv is None:
                log.info("%d chunks are not encoded in this worker process, but when they are first used", len(nodes))
            else:
                texts = [node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes]
                vectors = {text.strip(): n.embedding for n, text in zip(nodes, texts, strict=True) if n.embedding}
                kv.ingested(
                    self._name,
                    [(node.ref_doc_id, text) for node, text in zip(nodes, texts, strict=True)],
                    fuser=self._fuser,
                    vectors=vectors if self._embedded_before else {},
                    show_progress=self.show_progress,
                )
        except Exception:
            log.exception("chunks not encoded; prompts that contain them are prefilled as usual")
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        return await asyncio.to_thread(self, nodes, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        restore(self, state)


@dataclass(frozen=True)
class _Embed:
    """A model's `get_text_embedding_batch`, which as LlamaIndex wraps it can be neither copied nor pickled."""

    model: BaseEmbedding

    def __call__(self, texts: list[str]) -> list[list[float]]:
        return self.model.get_text_embedding_batch(texts)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Embed:
        return self  # a model's weights are not there twice


def _embedding_model(given: BaseEmbedding | str | None) -> BaseEmbedding:
    """The one that was given, or ``Settings.embed_model``. Raises ValueError that says what is wanted."""
    try:
        return Settings.embed_model if given is None else resolve_embed_model(given)
    except (ImportError, ValueError) as error:
        raise ValueError(
            "fuse needs an embedding model: CacheClipTransform(llm, fuse=10, embed_model=...) or Settings.embed_model; "
            f"{'the default' if given is None else repr(given)} cannot be had: {error}"
        ) from error
