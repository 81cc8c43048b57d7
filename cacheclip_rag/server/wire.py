"""Answers as OpenAI's API writes them: whole, in pieces, and as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from ..frameworks.structured.calls import Parsed
from ..report import Report
from .problems import problem_of

Json = dict[str, Any]


class Wire:
    """The objects of one answer, of a chat completion or of a text completion. ``shown``: whether the report is wanted,
    which is then under ``kv_transfer_params``, where vLLM's server has it.
    """

    def __init__(self, model: str, chat: bool, shown: bool = False) -> None:
        self._chat, self._shown = chat, shown
        self._kind = "chat.completion" if chat else "text_completion"
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._about = {"id": name, "created": int(time.time()), "model": model}

    def whole(self, parsed: Parsed, report: Report) -> Json:
        said: Json = {"text": _text(parsed)}
        if self._chat:
            said = {"message": {"role": "assistant", "content": _text(parsed) or (None if parsed.calls else "")}}
            if parsed.calls:
                said["message"]["tool_calls"] = _calls(parsed)
        return self._made([said | _end(parsed, report)], self._reported(report) | {"usage": report.usage})

    def piece(self, text: str) -> Json:
        return self._streamed([self._delta(text) | {"finish_reason": None}])

    def last(self, rest: Parsed, report: Report) -> Json:
        """The end of a streamed answer: tool calls, why it ended, the report."""
        said = self._delta(_text(rest))
        if rest.calls:
            said["delta"]["tool_calls"] = [{"index": index, **call} for index, call in enumerate(_calls(rest))]
        return self._streamed([said | _end(rest, report)], self._reported(report))

    def usage(self, report: Report) -> Json:
        return self._streamed([], {"usage": report.usage})

    def _delta(self, text: str) -> Json:
        return {"delta": {"role": "assistant", "content": text}} if self._chat else {"text": text}

    def _reported(self, report: Report) -> Json:
        return {"kv_transfer_params": {"cacheclip": report.as_dict()}} if self._shown else {}

    def _streamed(self, choices: list[Json], beside: Json | None = None) -> Json:
        made = self._made(choices, beside or {})
        return made | {"object": f"{self._kind}.chunk"} if self._chat else made

    def _made(self, choices: list[Json], beside: Json) -> Json:
        choices = [{"index": index, "logprobs": None, **choice} for index, choice in enumerate(choices)]
        return {**self._about, "object": self._kind, "choices": choices, **beside}


async def sse(first: Json, events: AsyncIterator[Json]) -> AsyncIterator[str]:
    """Server-sent events. The status is out by now, so an error is an event, too."""
    try:
        yield f"data: {json.dumps(first)}\n\n"
        async for event in events:
            yield f"data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield f"data: {json.dumps(problem_of(error))}\n\n"


def _end(parsed: Parsed, report: Report) -> Json:
    if parsed.calls:
        return {"finish_reason": "tool_calls"}
    return {"finish_reason": "length" if report.finish_reason == "length" else "stop"}


def _text(parsed: Parsed) -> str:
    """A call that cannot be read is what the model wrote."""
    return parsed.text + "".join(call.text for call in parsed.invalid)


def _calls(parsed: Parsed) -> list[Json]:
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for call in parsed.calls
    ]
