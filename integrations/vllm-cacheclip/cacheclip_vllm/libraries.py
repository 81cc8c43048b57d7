"""The chunk KV of a served model in the store: one `Library` for each tenant and encoding."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheclip_rag.corpus.usage import Usage
from cacheclip_rag.kv.encode import Encoder, Isolated
from cacheclip_rag.kv.library import KVDtype, Library
from cacheclip_rag.kv.variants import FusedVariants
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.store import LoadingCost, Place, Remote

from .served import ServedModel

GIB = 1 << 30
SECRET = "CACHECLIP_SECRET"
"""The environment variable of the secret, in hex, where there is one."""


@dataclass(frozen=True)
class StoreOptions:
    """Where chunk KV is kept: as the parameters of the same names of `Engine`. Its secret is in the environment."""

    store: str = "~/.cache/cacheclip/vllm"
    memory_bytes: int = 8 * GIB
    disk_bytes: int = 256 * GIB
    remote: str | None = None
    kv_dtype: KVDtype = "auto"


class Libraries:
    """The libraries of a served model, opened on first use. All of vLLM's processes have their own over one folder.

    ``in_memory``: whether this process keeps chunks in memory, as workers do; ``remote``: whether it asks the remote.
    """

    def __init__(self, model: ServedModel, options: StoreOptions, *, in_memory: bool, remote: bool = False) -> None:
        self.model = model
        self._options, self._in_memory, self._remote = options, in_memory, remote or in_memory
        self.cost = LoadingCost()
        """What loading chunks and computing tokens take in this process, whichever tenant's."""
        self._secret = bytes.fromhex(os.environ.get(SECRET, ""))
        self._places: dict[str, Place] = {}
        self._opened: dict[tuple[str, Encoder], Library] = {}
        self._variants: dict[tuple[str, Encoder], FusedVariants] = {}

    @property
    def has_remote(self) -> bool:
        return self._remote and bool(self._options.remote)

    def place(self, tenant: str) -> Place:
        """Where the chunks of this tenant are."""
        if tenant not in self._places:
            options = self._options
            self._places[tenant] = Place(
                Path(options.store),
                options.memory_bytes if self._in_memory else 0,
                options.disk_bytes,
                tenant,
                self._secret,
                Remote(options.remote) if options.remote and self._remote else None,
                self.cost,
            )
        return self._places[tenant]

    def of(self, tenant: str, encoder: Encoder) -> Library:
        """The chunks of this tenant and encoding."""
        name = tenant, encoder
        if name not in self._opened:
            place = self.place(tenant)
            model: Any = self.model  # a library without weights computes nothing
            self._opened[name] = Library(model, encoder, place.store, tenant, self._secret, self._options.kv_dtype)
        return self._opened[name]

    def beside(self, tenant: str, backbone: Backbone) -> Library:
        """The chunks of this tenant as another model encodes them, behind its own template's beginning."""
        return Library(backbone, Isolated(), self.place(tenant).store, tenant, self._secret, self._options.kv_dtype)

    def usage(self, tenant: str, encoder: Encoder) -> Usage:
        """The counts of which of these chunks come together, as the scheduler has saved them."""
        return Usage(self.place(tenant).usage_file(self.of(tenant, encoder).namespace))

    def variants(self, tenant: str, encoder: Encoder) -> FusedVariants:
        """The fused variants of these chunks."""
        name = tenant, encoder
        if name not in self._variants:
            self._variants[name] = FusedVariants(self.of(tenant, encoder))
        return self._variants[name]
