"""A chat engine over a folder of documents."""

import sys

from llama_index.core import SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.node_parser import SentenceSplitter
from llama_index.llms.cacheclip import CacheClipLLM, CacheClipTransform


def chat_engine(model: str, folder: str) -> BaseChatEngine:
    llm = CacheClipLLM(model, max_new_tokens=128, kv_dir=".cacheclip")
    index = VectorStoreIndex.from_documents(
        SimpleDirectoryReader(folder).load_data(),
        transformations=[SentenceSplitter(chunk_size=256), CacheClipTransform(llm)],
    )
    return index.as_chat_engine(chat_mode="context", llm=llm, similarity_top_k=4)


if __name__ == "__main__":
    chat_engine(*sys.argv[1:]).streaming_chat_repl()
