"""From a prompt to its KV, by the strategy that the method names; whatever fails is answered by full prefill."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable

from ..errors import ConfigurationError, PromptError
from ..interrupts import raised_by_signal
from ..kv.collections import Collections
from ..methods.auxiliary import Auxiliary
from ..report import Report
from .compose import Compose, Composer
from .full import Full, Native
from .harvest import Harvest
from .prefix import Prefix
from .result import Prefill, PrefillRequest

log = logging.getLogger("cacheclip_rag")

Strategy = Callable[[PrefillRequest, Report], Prefill]


class Prefiller:
    """The strategies by name: ``full``, ``prefix`` (caching), ``harvest`` (of finished prompts), ``compose`` (of stored
    chunks). Not for two threads at once; the engine's lock sees to that.
    """

    def __init__(self, collections: Collections) -> None:
        self._backbone = collections.backbone
        self._composer = Composer(collections)
        self._native = Native(collections.backbone, collections.index)
        self.strategies: dict[str, Strategy] = {
            "full": Full(collections.backbone, collections.index),
            "prefix": Prefix(collections),
            "harvest": Harvest(collections, self._composer),
            "compose": Compose(collections, self._composer),
        }

    @property
    def auxiliary(self) -> Auxiliary | None:
        """The model that selects tokens for methods that ask one."""
        return self._composer.auxiliary

    @auxiliary.setter
    def auxiliary(self, auxiliary: Auxiliary | None) -> None:
        self._composer.auxiliary = auxiliary

    def __call__(self, request: PrefillRequest, report: Report) -> Prefill:
        """Raises `PromptError` for a prompt that is empty or beyond the context length, `ConfigurationError` for a
        strategy that nobody brings.
        """
        if self._backbone.obstacle is not None:
            report.fallbacks.append(f"plain prefill: {self._backbone.obstacle}")
            return self._native(request, report)
        full, name = self.strategies["full"], request.method.strategy
        if name not in self.strategies:
            raise ConfigurationError(f'method "{request.method.name}" names a strategy "{name}", which is not there')
        if name == "full" or (request.ratio >= 1.0 and name != "prefix"):
            return full(request, report)
        try:
            return self.strategies[name](request, report)
        except PromptError:
            raise
        except Exception as error:  # whatever goes wrong in reuse costs time, never the answer
            if raised_by_signal(error):
                raise
            log.exception("reuse failed; prefilling the whole prompt")
            report.fallbacks.append(f"full prefill: {type(error).__name__}: {error}")
            report.fit, report.requested_ratio = None, request.ratio
            report.prefix = report.reused = report.adjusted = report.recomputed = report.edges = 0
            traceback.clear_frames(error.__traceback__)  # it holds on to the canvas, and memory may be what lacked
            return full(request, report)
