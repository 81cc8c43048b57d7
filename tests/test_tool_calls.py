"""Tool calls as chat templates write them: found out from the template, told from text, chosen."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import TEMPLATE, two_layers

from cacheclip_rag import ConfigurationError
from cacheclip_rag.frameworks.structured.calls import CallReader, parse
from cacheclip_rag.frameworks.structured.dialect import Dialect, dialect_of
from cacheclip_rag.frameworks.structured.formats import choice_of

HERMES = Dialect("<tool_call>\n", "\n</tool_call>", "name", "arguments")
BARE = Dialect("", "", "name", "parameters")
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Örebro", "days": 2}}\n</tool_call>'

LLAMA = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT_ARGUMENTS = LLAMA.replace("arguments | tojson", "arguments | tojson | tojson").replace('{"name', 'Calling: {"name')
XML = LLAMA.replace('{"name": "', "<function=").replace('", "parameters": ', ">").replace("| tojson }}}", "| tojson }}")
ONLY_OFFERED = TEMPLATE + "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        (LLAMA, BARE),
        (TEXT_ARGUMENTS, Dialect("Calling: ", "", "name", "parameters", True)),
        (XML, None),
        (ONLY_OFFERED, None),
        (TEMPLATE, None),
        (None, None),
    ],
)
def test_dialects(template: str | None, dialect: Dialect | None) -> None:
    assert dialect_of(two_layers(template)) == dialect


def test_the_dialect_of_the_tests_template() -> None:
    assert dialect_of(two_layers()) == HERMES


@pytest.mark.parametrize(
    ("answer", "text", "calls", "invalid"),
    [
        ("No call.", "No call.", [], 0),
        (CALL, "", [("weather", {"place": "Örebro", "days": 2})], 0),
        (f"Let me look.\n{CALL}", "Let me look.", [("weather", {"place": "Örebro", "days": 2})], 0),
        (f"{CALL}\n{CALL}", "", [("weather", {"place": "Örebro", "days": 2})] * 2, 0),
        ('<tool_call>\n{"name": "clock"}', "", [("clock", {})], 0),
        ('<tool_call>{"name": "clock", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("clock", {"a": 1})], 0),
        ('<tool_call>\n{"name": "weather", "argu', "", [], 1),
        ("<tool_call>\nnonsense\n</tool_call>\nSorry.", "\nSorry.", [], 1),
        ('<tool_call>\n{"name": 3}\n</tool_call>', "", [], 1),
        ('<tool_call>\n["a", 3]\n</tool_call>', "", [], 2),
        ('```json\n{\n  "name": "clock",\n  "arguments": {}\n}\n```', "", [("clock", {})], 0),
        ('{"name": "clock", "arguments": {"a": 1}}', "", [("clock", {"a": 1})], 0),
        ('{"name": "clock", "arguments": 3}', "", [], 1),
        ('{"name": "nobody", "arguments": {}}', '{"name": "nobody", "arguments": {}}', [], 0),
        ('{"name": ["clock"], "arguments": {}}', '{"name": ["clock"], "arguments": {}}', [], 0),
        ("```python\nprint(1)\n```\n", "```python\nprint(1)\n```\n", [], 0),
        ("`clock` is a < b", "`clock` is a < b", [], 0),
        (" \n", " \n", [], 0),
    ],
)
def test_parsing_whole_and_in_pieces(answer: str, text: str, calls: list[Any], invalid: int) -> None:
    names = {"weather", "clock"}
    parsed = parse(HERMES, answer, names)
    for size in (1, 3, 7, len(answer)):
        reader = CallReader(HERMES, names)
        sent = "".join(reader.feed(answer[i : i + size]) for i in range(0, len(answer), size))
        rest = reader.close()
        for got, before in ((parsed, ""), (rest, sent)):
            assert before + got.text == text
            assert [(call.name, call.arguments) for call in got.calls] == calls
            assert len(got.invalid) == invalid and all(call.error for call in got.invalid)


@pytest.mark.parametrize(
    ("answer", "calls"),
    [
        ('{"name": "clock", "parameters": {}}', 1),
        ('[{"name": "clock", "parameters": {}}, {"name": "clock", "parameters": {}}]', 2),
        ('{"name": "somebody", "parameters": {}}', 0),
        ('{"title": "not a call"}', 0),
        ("Just [text] {and} more", 0),
        ("[1] says so.", 0),
        ("[]", 0),
    ],
)
def test_bare_calls(answer: str, calls: int) -> None:
    reader = CallReader(BARE, {"clock"})
    sent = "".join(reader.feed(character) for character in answer)
    rest = reader.close()
    assert len(parse(BARE, answer, {"clock"}).calls) == len(rest.calls) == calls
    assert sent + rest.text == ("" if calls else answer)


@pytest.mark.parametrize(
    ("choice", "meant"),
    [
        ({"type": "any"}, "any"),
        ({"type": "none"}, "none"),
        ({"type": "auto"}, None),
        ({"type": "tool", "name": "look"}, "look"),
        ({"type": "function", "function": {"name": "look"}}, "look"),
    ],
)
def test_a_choice_of_tools_may_be_a_dictionary(choice: dict[str, Any], meant: str | None) -> None:
    assert choice_of(choice, [{"type": "function", "function": {"name": "look"}}]) == meant


def test_a_choice_that_names_nothing_is_refused() -> None:
    for choice in ({"foo": 1}, {"type": "often"}):
        with pytest.raises(ConfigurationError, match="tool_choice"):
            choice_of(choice, [{"type": "function", "function": {"name": "look"}}])
