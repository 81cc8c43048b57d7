"""Grammars: what they let through, and that a guided answer is complete within its tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny import two_layers

from cacheclip_rag import Backbone
from cacheclip_rag.frameworks.structured.grammar import Follower, Literal, any_object, json_grammar
from cacheclip_rag.frameworks.structured.guide import Guide

TREE = {
    "$defs": {
        "node": {"type": "object", "properties": {"leaves": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}
    },
    "$ref": "#/$defs/node",
}
REQUIRED_TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["next"],
        }
    },
    "$ref": "#/$defs/node",
}
SOME: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "é": {"enum": ["x", "ü", 1]}},
    "required": ["é"],
}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (
            SOME,
            ['{"é": "ü"}', '{"a": -3, "é": 1}', '{"a": 0, "b": "q\\"", "é": "x"}'],
            ["{}", '{"b": "", "a": 1}', "1"],
        ),
        ({"type": "string", "maxLength": 2}, ['""', '"ab"', '"東🚂"'], ['"abc"', '"\n"', "a"]),
        ({"type": "integer"}, ["0", "-12"], ["01", "1.5", "--1", ""]),
        ({"type": "number"}, ["0", "-12.25"], ["1.", ".5"]),
        ({"type": ["boolean", "null"]}, ["true", "null"], ["nul", '"true"']),
        ({"type": "string", "nullable": True}, ["null", '"x"'], ["1"]),
        (
            {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
            ["[1]", "[1, 2]"],
            ["[]", "[1, 2, 3]"],
        ),
        ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
        ({"prefixItems": [{"type": "integer"}, {"type": "string"}], "type": "array"}, ['[1, "a"]'], ["[1]"]),
        ({"const": {"a": 1}}, ['{"a": 1}'], ['{"a": 2}']),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, ["{}", '{"k": 1, "l": 2}'], ['{"k": "v"}']),
        ({"type": "object", "properties": {}}, ["{}"], ['{"k": 1}']),
        ({"allOf": [SOME, {"required": ["a"]}]}, ['{"a": 1, "é": 1}'], ['{"é": 1}']),
        (TREE, ["{}", '{"leaves": [{}, {"leaves": []}]}'], ['{"leaves": 1}']),
        (REQUIRED_TREE, ['{"next": null}', '{"next": {"next": null}}'], ["{}"]),
        ({}, ['{"a": [1, {"b": null}]}', "1", '"x"'], ["{'a': 1}", "x"]),
        ({"oneOf": [{"const": "a"}, {"type": "integer"}]}, ['"a"', "7"], ['"b"']),
    ],
)
def test_schemas(schema: Any, right: list[str], wrong: list[str]) -> None:
    follower = Follower(json_grammar(schema))
    shortest = follower.left(follower.start)
    for text in right:
        state = follower.run(follower.start, text.encode())
        assert state and follower.complete(state), text
        json.loads(text)
        assert shortest <= len(text.encode())
    for text in wrong:
        state = follower.run(follower.start, text.encode())
        assert not state or not follower.complete(state), text


def test_many_optional_properties_cost_no_time() -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(200)}}
    follower = Follower(json_grammar(schema))
    assert follower.left(follower.start) == 2
    assert follower.complete(follower.run(follower.start, b'{"p3": 1, "p199": 2}'))


def test_what_must_end_and_what_may() -> None:
    follower = Follower(json_grammar({"type": "integer"}))
    state = follower.run(follower.start, b"12")
    assert follower.complete(state) and not follower.finished(state)
    follower = Follower(Literal("ab"))
    assert follower.finished(follower.run(follower.start, b"ab")) and not follower.finished(follower.start)


@pytest.fixture(scope="module")
def tiny_backbone() -> Backbone:
    return two_layers()


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize(("schema", "tokens"), [(SOME, 14), (SOME, 60), ({}, 5), (TREE, 40), (REQUIRED_TREE, 30)])
def test_an_answer_is_complete_within_its_tokens(
    tiny_backbone: Backbone, schema: Any, tokens: int, sample: bool
) -> None:
    """Whatever the scores are: with random ones a string would otherwise go on to the end."""
    torch.manual_seed(tokens)
    guide = Guide(tiny_backbone, json_grammar(schema), tokens, sample)
    ids = torch.zeros(1, 7, dtype=torch.long)
    for _ in range(tokens):
        scores = guide(ids, torch.randn(1, 260))
        token = torch.multinomial(scores.softmax(-1), 1) if sample else scores.argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        if guide.done(ids, None) or int(token) in (257,):
            break
    text = tiny_backbone.tokenizer.decode(ids[0, 7:], skip_special_tokens=True)
    json.loads(text)


def test_any_object_is_an_object() -> None:
    follower = Follower(any_object())
    assert follower.left(follower.start) == 2 and not follower.run(follower.start, b"[")
