"""The configuration of the connector: ``kv_connector_extra_config`` of vLLM's ``--kv-transfer-config``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from cacheclip_rag import methods
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.methods import Method

from .libraries import StoreOptions
from .plan import refused


@dataclass(frozen=True)
class Settings(StoreOptions):
    """The store's options; ``method`` and ``recompute_ratio`` of requests that name none; ``fuse_when_idle``: fuse
    chunks that prompts held together while there is no request; ``auxiliary``: a small model that selects rows, on each
    worker's CPU (a catalogue name, hub id or folder), with which the method is "cacheclip" if none is named;
    ``untested``: whether a version of vLLM that the tests were not run with is to "refuse" to start, or is served
    "plain", without reuse; ``unsupported``: the same for a model or a configuration whose KV cannot be reused.
    """

    method: str | None = None
    recompute_ratio: float | None = None
    fuse_when_idle: bool = False
    auxiliary: str | None = None
    untested: Literal["refuse", "plain"] = "refuse"
    unsupported: Literal["refuse", "plain"] = "refuse"

    @property
    def default(self) -> Method:
        """The method of requests that name none. Raises `ConfigurationError`."""
        changes = (
            {} if self.recompute_ratio is None else {"recompute_ratio": self.recompute_ratio, "fitted_ratio": None}
        )
        method = methods.resolve(self.method or ("auto" if self.auxiliary is None else "cacheclip"), **changes)
        if (reason := refused(method, self.auxiliary is not None)) is not None:
            raise ConfigurationError(f'method "{method.name}" cannot be used inside vLLM: {reason}')
        return method


def settings(vllm_config: Any) -> Settings:
    """The settings of a vLLM configuration. Raises `ConfigurationError` for unknown names."""
    extra = dict(vllm_config.kv_transfer_config.kv_connector_extra_config)
    known = {one.name for one in fields(Settings)}
    if unknown := set(extra) - known:
        raise ConfigurationError(f"unknown option {sorted(unknown)[0]!r}; there are: {', '.join(sorted(known))}")
    for name in ("untested", "unsupported"):
        if extra.get(name, "plain") not in ("refuse", "plain"):
            raise ConfigurationError(f'{name} is "refuse" or "plain", not {extra[name]!r}')
    return Settings(**extra)
