"""Reports of answers that came over HTTP: of this library's server, and of vLLM's, which counts in less detail."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...report import ChunkUse, Report

log = logging.getLogger("cacheclip_rag")

_NAMES = {one.name for one in fields(Report)} - {"token_sources", "sources", "chunks"}
_CHUNK = {one.name for one in fields(ChunkUse)}
_NONE = "the answer came without a report: vLLM's server sends none with a stream, and other servers have none"


@dataclass
class Unreported(Report):
    """Of an answer that came without a report; of its numbers only those of ``usage`` are known, if these came."""

    @property
    def nothing_known(self) -> str:
        return _NONE

    def __str__(self) -> str:
        return f"{self.prompt_tokens:,} prompt tokens; {_NONE}"


def report_in(answer: Any) -> Report | None:
    """The report in a response, or in a piece of one, as OpenAI's client has it; None where there is none.

    Its ``sources`` and ``token_sources`` are empty. Times are the server's; vLLM's report has none.
    """
    transfer = _get(answer, "kv_transfer_params")
    given = transfer.get("cacheclip") if isinstance(transfer, Mapping) else None
    if not isinstance(given, Mapping):
        return None
    try:
        counts = _of_vllm(given) if "tokens" in given or "method" not in given else given
        report = Report(**{"requested_ratio": 0.0, **{name: counts[name] for name in _NAMES & counts.keys()}})
        if isinstance(given.get("chunks"), list):
            report.chunks = [ChunkUse(**{name: one[name] for name in _CHUNK}) for one in given["chunks"]]
        return with_usage(report, answer)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of another version
        log.warning("the server's report cannot be read: %s", error)
        return None


def unreported(answer: Any = None) -> Unreported:
    """Instead of a report; ``answer``: where the usage is, if it came."""
    return with_usage(Unreported("unknown", 0.0), answer)


def with_usage(report: Any, answer: Any) -> Any:
    """The report, with what the response's ``usage`` says and it does not."""
    usage = _get(answer, "usage")
    for name in ("prompt_tokens", "completion_tokens"):
        if not getattr(report, name) and isinstance(count := _get(usage, name), int):
            setattr(report, name, count)
    return report


def _of_vllm(given: Mapping[str, Any]) -> dict[str, Any]:
    """Its token counts are by `TokenSource`; without any, nothing was reused."""
    tokens: Mapping[str, int] = given.get("tokens") or {}
    return {
        "method": "full",
        **given,
        "prefix": tokens.get("prefix", 0),
        "reused": sum(tokens.get(source, 0) for source in ("reused", "in_place", "adjusted")),
        "recomputed": tokens.get("recomputed", 0),
        "fresh": sum(tokens.get(source, 0) for source in ("fresh", "edge")),
        "adjusted": tokens.get("adjusted", 0),
        "edges": tokens.get("edge", 0),
    }


def _get(of: Any, name: str) -> Any:
    return of.get(name) if isinstance(of, Mapping) else getattr(of, name, None)
