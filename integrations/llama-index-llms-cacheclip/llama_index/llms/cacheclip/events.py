"""What LlamaIndex's instrumentation is told of a request, beside the events every LLM has."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.base import BaseEvent

if TYPE_CHECKING:
    from cacheclip_rag.report import Report

log = logging.getLogger("cacheclip_rag")
dispatcher = get_dispatcher(__name__)


class CacheClipReuseEvent(BaseEvent):
    """A request has ended: how many prompt tokens were read from cache and not recomputed, and the whole report.

    ``report`` is `cacheclip_rag.Report.as_dict`, as in a response's ``raw["cacheclip"]``. Comes once a call, streams
    that were left early included.
    """

    model_name: str
    prompt_tokens: int
    cached_tokens: int
    recomputed_tokens: int
    fresh_tokens: int
    time_to_first_token: float
    report: dict[str, Any]

    @classmethod
    def class_name(cls) -> str:
        return "CacheClipReuseEvent"


def tell(model_name: str, report: Report, span: str | None) -> None:
    """Send the event. A handler that fails is logged: the answer is there already.

    ``span``: the id of the call's span; a stream ends when it is not the active one any more.
    """
    try:
        dispatcher.event(
            CacheClipReuseEvent(
                model_name=model_name,
                prompt_tokens=report.prompt_tokens,
                cached_tokens=report.cached_tokens,
                recomputed_tokens=report.recomputed,
                fresh_tokens=report.fresh,
                time_to_first_token=report.ttft,
                report=report.as_dict(),
                span_id=span,
            )
        )
    except Exception:
        log.exception("a handler of LlamaIndex events failed")
