"""What ``cacheclip ingest`` and ``cacheclip ask`` do: a folder of documents, questions about it, through LlamaIndex.

Apart from `cacheclip_rag` because the core knows no framework. It needs what the extra ``app`` brings.
"""

from .folder import Ingested, Library, ingest
from .session import Reply, Session

__all__ = ["Ingested", "Library", "Reply", "Session", "ingest"]
