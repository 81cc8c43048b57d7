"""Reuse of document chunks' KV inside vLLM: a KV connector over the methods and the store of `cacheclip_rag`."""

from __future__ import annotations

import os
import secrets

PROOF = "CACHECLIP_VLLM_PROOF"
"""The environment variable with what the server's processes know and its clients do not."""


def register() -> None:
    """vLLM's plugin hook, called in each of its processes: names the connector, and makes the proof once."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    os.environ.setdefault(PROOF, secrets.token_hex(16))
    try:
        KVConnectorFactory.register_connector("CacheClipConnector", "cacheclip_vllm.connector", "CacheClipConnector")
    except ValueError:  # registered by an earlier call in this process
        pass
