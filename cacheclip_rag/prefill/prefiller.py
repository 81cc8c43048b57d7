"""Prefill by the strategy that a method names, with full prefill as the fallback of every failure."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import ConfigurationError, PromptError
from ..interrupts import raised_by_signal
from ..kv.collections import Collections
from ..methods import Method
from ..methods.auxiliary import Auxiliary
from ..prompt import Span, Tokens
from ..report import Report
from .compose import Compose, Composer
from .full import Full, Native
from .harvest import Harvest
from .loading import Loader, Loads
from .prefix import Prefix
from .reading import Reading, read
from .result import Prefill, PrefillRequest

log = logging.getLogger("cacheclip_rag")

Strategy = Callable[[PrefillRequest, Reading, Report], Prefill]


class Prefiller:
    """The prefill strategies by name: ``full``, ``prefix`` (prefix caching), ``harvest`` (variants from finished
    prompts) and ``compose`` (chunks encoded ahead). Callers hold the engine's lock, but not for `read`.
    """

    def __init__(self, collections: Collections) -> None:
        self._backbone, self._collections = collections.backbone, collections
        self._composer = Composer(collections)
        self._loader = Loader(collections)
        self._native = Native(collections.backbone)
        self.strategies: dict[str, Strategy] = {
            "full": Full(collections),
            "prefix": Prefix(collections),
            "harvest": Harvest(collections, self._composer),
            "compose": Compose(collections, self._composer, self._loader),
        }

    @property
    def auxiliary(self) -> Auxiliary | None:
        """The auxiliary model that selects tokens, or None."""
        return self._composer.auxiliary

    @auxiliary.setter
    def auxiliary(self, auxiliary: Auxiliary | None) -> None:
        self._composer.auxiliary = auxiliary

    def _check_models(self) -> None:
        """Raises `ConfigurationError` where stored KV is of another state of the model, or of the auxiliary one."""
        for library in self._collections.libraries():
            if (changed := library.changed()) is not None:
                raise ConfigurationError(changed)

    def announce(self, texts: Sequence[str], method: Method) -> None:
        """Begin to load these chunks, which are expected in a prompt, in this order."""
        if method.strategy == "compose":
            self._loader.announce(texts, method)

    def read(self, request: PrefillRequest, report: Report) -> Reading:
        """Recognise and tokenise a request's prompt (see `reading.read`), and load its chunks, so that nobody waits for
        them with the lock. If that fails, it is tried once more, for a full prefill: which parts of a prompt are
        documents must be known for it, too.
        """

        def load(spans: Sequence[Span], tokens: Tokens) -> Loads | None:
            reused = self._backbone.obstacle is None and request.method.strategy == "compose" and request.ratio < 1.0
            return self._loader.begin_for(spans, tokens, request.method) if reused and spans else None

        try:
            reading = read(self._backbone, self._collections.index, request, report, load)
        except PromptError:
            raise
        except Exception as error:
            _fall_back(report, error)
            again = read(self._backbone, self._collections.index, replace(request, hints=None), report)
            return replace(again, failed=True)
        scores = request.method.select.needs_auxiliary  # an auxiliary model on another device does so meanwhile
        if reading.loads is not None and not scores:
            with report.timed("load"):
                reading.loads.wait()
        return reading

    def __call__(self, request: PrefillRequest, reading: Reading, report: Report) -> Prefill:
        """Prefill a request whose prompt was read, and fill in its report.

        Raises `PromptError`, and `ConfigurationError` for an unknown strategy.
        """
        if self._backbone.obstacle is not None:
            report.fallbacks.append(f"plain prefill: {self._backbone.obstacle}")
            return self._native(request, reading, report)
        full, name = self.strategies["full"], request.method.strategy
        if name not in self.strategies:
            raise ConfigurationError(f'method "{request.method.name}" names a strategy "{name}", which is not there')
        if name == "full" or reading.failed or (request.ratio >= 1.0 and name != "prefix"):
            return full(request, reading, report)
        try:
            self._check_models()
            return self.strategies[name](request, reading, report)
        except PromptError:
            raise
        except Exception as error:  # a failure in reuse costs time, never the answer
            _fall_back(report, error)
            report.fit, report.requested_ratio = None, request.ratio
            report.prefix = report.reused = report.adjusted = report.recomputed = report.edges = report.soft_tokens = 0
            traceback.clear_frames(error.__traceback__)  # frees the canvas: the error may be a lack of memory
            return full(request, reading, report)


def _fall_back(report: Report, error: Exception) -> None:
    """Log and report a failure in reuse. Raises ``error`` if a signal handler did."""
    if raised_by_signal(error):
        raise error
    log.exception("reuse failed; prefilling the whole prompt")
    report.fallbacks.append(f"full prefill: {type(error).__name__}: {error}")
