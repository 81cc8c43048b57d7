"""What ``cacheclip ingest`` and ``cacheclip ask`` do: a folder of documents, questions about it, through LlamaIndex.

Apart from `cacheclip_rag` because the core knows no framework. It needs what the extra ``app`` brings. `folder` reads
and keeps documents, `session` answers questions about them, `embedding` has sentence embeddings by name.
"""
