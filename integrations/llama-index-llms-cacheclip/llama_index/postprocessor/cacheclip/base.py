"""`CacheClipPostprocessor`: between retrieval and the LLM, where the chunks and the question are known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index.llms.cacheclip.copies import restore

from cacheclip_rag.frameworks import Handle, OnMiss, handle_of, prepare_retrieved

if TYPE_CHECKING:
    from llama_index.llms.cacheclip import CacheClipLLM

    from cacheclip_rag.engine import Engine


class CacheClipPostprocessor(BaseNodePostprocessor):
    """Starts loading the retrieved chunks' KV, tells the engine the question, and encodes what has no KV yet.

    It returns the nodes untouched and never raises: without it answers come all the same, only later. Put it last, so
    that it sees the chunks that the LLM will see.
    """

    on_miss: OnMiss = Field(
        default="background",
        description="Chunks without KV: encode them after the answer, before it, or not at all.",
    )

    _handle: Handle = PrivateAttr()

    def __init__(self, llm: CacheClipLLM | Engine, **fields: Any) -> None:
        super().__init__(**fields)
        self._handle = handle_of(llm)

    @classmethod
    def class_name(cls) -> str:
        return "CacheClipPostprocessor"

    @property
    def handle(self) -> Handle:
        """What stands for the engine, whether it is open or not, or for the server."""
        return self._handle

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        # MetadataMode.LLM is what response synthesizers put into the prompt
        texts = [node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes]
        question = None if query_bundle is None else query_bundle.query_str
        prepare_retrieved(self._handle, texts, question, self.on_miss)
        return nodes

    def __setstate__(self, state: dict[str, Any]) -> None:
        restore(self, state)
