"""``--worker-cls cacheclip_vllm.worker.Worker``: the platform's own worker, which hands its model to the connector."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.platforms import current_platform

from . import seams

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Base
else:
    from vllm.v1.worker.gpu_worker import Worker as Base


class Worker(Base):
    """vLLM's worker. Its connector computes with the loaded model, which a connector is not given by itself."""

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        if has_kv_transfer_group() and hasattr(connector := get_kv_transfer_group(), "attach"):
            connector.attach(self.model_runner.get_model(), self.device, seams.kernel_blocks(self.model_runner))
