"""What the LlamaIndex and LangChain integrations share; it imports neither framework.

Engines that a process opens once, the options of a call, conversations, tool calls and structured output, and KV that
follows a vector store. Nothing here loads torch or transformers before the first engine does. The fields of the
frameworks' models are in `frameworks.fields`, which needs pydantic.
"""

from .chunk_kv import ChunkKV, Handle, OnMiss, Part, prepare_retrieved
from .engine_kv import encode
from .engines import EngineHandle, EngineSettings, encoding_of, handle_of
from .follow import StoreFollower
from .fuser import Fuser
from .held_ids import HeldIds, StoredChunk
from .options import call_options, check_fields, read_options
from .pump import in_thread, pump
from .request import ChatRequest, chat_request, engine_name, guided, needed_dialect

__all__ = [
    "ChatRequest",
    "ChunkKV",
    "EngineHandle",
    "EngineSettings",
    "Fuser",
    "Handle",
    "HeldIds",
    "OnMiss",
    "Part",
    "StoreFollower",
    "StoredChunk",
    "call_options",
    "chat_request",
    "check_fields",
    "encode",
    "encoding_of",
    "engine_name",
    "guided",
    "handle_of",
    "in_thread",
    "needed_dialect",
    "prepare_retrieved",
    "pump",
    "read_options",
]
