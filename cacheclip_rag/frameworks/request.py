"""One call of a chat model: its tools and response format, and the parsing of its answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .messages import render, with_instruction
from .structured.calls import CallReader, Parsed, parse
from .structured.dialect import Dialect, dialect_of
from .structured.formats import choice_of, format_of
from .structured.grammar import Node
from .structured.guide import Guide, call_grammar

if TYPE_CHECKING:
    from ..engine import Engine
    from ..report import Report
    from ..serving.decoding import TextStream


@dataclass(frozen=True)
class ChatRequest:
    """One call, ready for the engine. ``dialect``: how its model writes calls; None where no tools are offered."""

    engine: Engine
    prompt: str
    options: dict[str, Any]
    dialect: Dialect | None = None
    tools: frozenset[str] = frozenset()
    parallel_calls: bool = True

    def answer(self, cancel: threading.Event | None = None) -> tuple[Parsed, Report]:
        """The whole answer."""
        answer = self.engine.generate(self.prompt, cancel=cancel, **self.options)
        parsed = Parsed(answer.text) if self.dialect is None else parse(self.dialect, answer.text, self.tools)
        return self.kept(parsed), answer.report

    def stream(self, cancel: threading.Event | None = None) -> AnswerStream:
        """The answer as it comes. Options that are wrong raise here, not at the first ``next``."""
        reader = None if self.dialect is None else CallReader(self.dialect, self.tools)
        return AnswerStream(self, self.engine.stream(self.prompt, cancel=cancel, **self.options), reader)

    def kept(self, parsed: Parsed) -> Parsed:
        """The answer without further calls, where one at a time is asked for."""
        return parsed if self.parallel_calls else replace(parsed, calls=parsed.calls[:1])


class AnswerStream:
    """A streamed answer: iterate for pieces of its text; then ``rest`` is what else there is, its tool calls
    among it. ``report`` grows with it. `close` ends the request early, as does leaving a ``with`` block.
    """

    def __init__(self, request: ChatRequest, stream: TextStream, reader: CallReader | None) -> None:
        self.report = stream.report
        self.rest = Parsed()
        self._request, self._stream, self._reader = request, stream, reader

    def __iter__(self) -> Iterator[str]:
        for delta in self._stream:
            text = delta if self._reader is None else self._reader.feed(delta)
            if text:
                yield text
        if self._reader is not None:
            self.rest = self._request.kept(self._reader.close())

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def chat_request(
    engine: Engine,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    *,
    tools: Sequence[dict[str, Any]] = (),
    tool_choice: Any = None,
    response_format: Any = None,
    parallel_calls: bool = True,
) -> ChatRequest:
    """``messages`` as `frameworks.messages` makes them, ``options`` the engine's, ``tools`` by their JSON schemas.

    Raises `ConfigurationError` for a choice or a format that makes no sense, NotImplementedError for tools where the
    chat template has none, and `PromptError` for a conversation that it refuses.
    """
    backbone, choice = engine.backbone, choice_of(tool_choice, tools)
    offered = tools if choice != "none" else ()
    dialect = needed_dialect(engine) if offered else None
    grammar, instruction = format_of(response_format)
    if instruction:
        messages = with_instruction(backbone, messages, instruction)
    if dialect is not None and choice is not None:
        grammar = call_grammar(dialect, offered, None if choice == "any" else choice)
    prompt = render(backbone, messages, offered)
    names = frozenset(tool["function"]["name"] for tool in offered)
    return ChatRequest(engine, prompt, guided(engine, grammar, options), dialect, names, parallel_calls)


def needed_dialect(engine: Engine) -> Dialect:
    """How the engine's model writes tool calls. Raises NotImplementedError for one whose template has none."""
    dialect = dialect_of(engine.backbone)
    if dialect is None:
        name = engine_name(engine)
        raise NotImplementedError(f"the chat template of {name} has no tool calls that can be read")
    return dialect


def guided(engine: Engine, grammar: Node | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an answer that can only be what ``grammar`` allows; as they are for None."""
    if grammar is None:
        return dict(options)
    sample = bool(options.get("do_sample", options.get("temperature")))
    return {**options, **Guide(engine.backbone, grammar, options["max_new_tokens"], sample).options()}


def engine_name(engine: Engine) -> str:
    """What the engine's model is called."""
    return str(engine.backbone.model.name_or_path or engine.backbone.config.model_type)
