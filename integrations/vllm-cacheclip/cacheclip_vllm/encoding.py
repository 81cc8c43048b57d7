"""Requests that compute a chunk's KV: through vLLM's own scheduler, so that ingestion and answers share its budget."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from cacheclip_rag.chunks import canonical
from cacheclip_rag.methods import Method, resolve

from . import PROOF
from .plan import FIELD
from .served import ServedModel


def encode_request(
    model: ServedModel,
    method: Method | str,
    text: str,
    *,
    tenant: str = "",
    context: Sequence[str] = (),
) -> tuple[list[int], dict[str, Any]]:
    """The token ids and the ``kv_transfer_params`` of a request that encodes ``text`` as ``method`` wants it.

    ``method``: a name, or the server's own method as it is, parameters included. It asks for one token of no matter;
    the worker computes the rows before it and stores the chunk's. ``context``: stored chunks to compute it behind
    (fusion). Only processes of the server can make such a request.
    """
    encoder = (resolve(method) if isinstance(method, str) else method).encode
    text, context = canonical(text), [canonical(other) for other in context]
    tokens: Any = model  # an encoder asks for nothing but tokens here
    pieces = [encoder.prefix_ids(tokens), *(model.tokenise(piece, plain=True).ids for piece in (*context, text))]
    ids = torch.cat([*pieces, torch.zeros(1, dtype=torch.long)]).tolist()
    named = {"method": method} if isinstance(method, str) else {}
    encode = {"text": text, "context": context}
    return ids, {FIELD: {**named, "tenant": tenant, "encode": encode, "proof": os.environ.get(PROOF)}}
