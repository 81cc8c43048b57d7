"""JSON schemas as grammars over bytes, followed one byte at a time.

What a schema says about shape is followed: objects with their properties in order, required or not, arrays, enums,
alternatives, references. Formats, patterns and ranges of numbers are not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, TypeAlias


class Node:
    """A piece of a grammar. Pieces are compared by identity, so that what follows stays cheap to compare."""


Config: TypeAlias = "tuple[Node, Config] | None"
"""What is still to come, nearest first; None: nothing."""
State: TypeAlias = frozenset["Config"]
"""Everything that may still come."""


class Literal(Node):
    def __init__(self, text: str | bytes) -> None:
        self.bytes = text.encode() if isinstance(text, str) else text

    @cached_property
    def tail(self) -> Literal:
        return Literal(self.bytes[1:])


class OneOf(Node):
    """One byte of a set."""

    def __init__(self, accepted: bytes) -> None:
        self.accepted = frozenset(accepted)


class Sequence(Node):
    def __init__(self, *parts: Node) -> None:
        self.parts = parts


class Either(Node):
    def __init__(self, *choices: Node) -> None:
        self.choices = choices


class Repeat(Node):
    """``part``, which is never empty, at least ``low`` and at most ``high`` times."""

    def __init__(self, part: Node, low: int = 0, high: int | None = None) -> None:
        self.part, self.low, self.high = part, low, high

    @cached_property
    def more(self) -> Repeat:
        if not self.low and self.high is None:
            return self
        return Repeat(self.part, max(0, self.low - 1), None if self.high is None else self.high - 1)


class Reference(Node):
    """Stands for a piece that may contain itself."""

    def __init__(self) -> None:
        self.node: Node | None = None


class Follower:
    """Follows a grammar; remembers every step, since a vocabulary asks for the same ones over and over."""

    def __init__(self, grammar: Node) -> None:
        self.start: State = frozenset([(grammar, None)])
        self._steps: dict[tuple[State, int], State] = {}
        self._left: dict[State, float] = {}
        self._sizes: dict[Node, float] = {}
        self._circles: dict[Reference, float] = {}
        before: list[float] = [-1.0]
        while before != [*self._circles.values()]:  # pieces that contain themselves: until nothing gets shorter
            before = [*self._circles.values()]
            self._sizes = {}
            self._size(grammar)
            for reference in [*self._circles]:
                assert reference.node is not None
                self._circles[reference] = self._size(reference.node)
        self._sizes = {}

    def step(self, state: State, byte: int) -> State:
        """What may come behind this byte; empty if the byte may not."""
        key = (state, byte)
        if key not in self._steps:
            self._steps[key] = frozenset(rest for config in state for rest in self._behind(config, byte))
        return self._steps[key]

    def run(self, state: State, text: bytes) -> State:
        for byte in text:
            state = self.step(state, byte)
            if not state:
                break
        return state

    def complete(self, state: State) -> bool:
        """Whether it may end here."""
        return self.left(state) == 0

    def finished(self, state: State) -> bool:
        """Whether it must end here."""
        return all(not any(self._heads(config)) for config in state)

    def left(self, state: State) -> float:
        """The fewest bytes to an end."""
        if state not in self._left:
            self._left[state] = min((self._length(config) for config in state), default=math.inf)
        return self._left[state]

    def _length(self, config: Config) -> float:
        total = 0.0
        while config is not None:
            node, config = config
            total += self._size(node)
        return total

    def _size(self, node: Node) -> float:
        """The fewest bytes this piece can be."""
        waiting = [node]  # not by recursion: an object of many properties is as deep as they are many
        while waiting:
            piece = waiting[-1]
            missing = [part for part in _parts(piece) if part not in self._sizes]
            if missing:
                waiting += missing
            else:
                self._sizes[piece] = self._sized(piece)
                waiting.pop()
        return self._sizes[node]

    def _sized(self, node: Node) -> float:
        sizes = [self._sizes[part] for part in _parts(node)]
        if isinstance(node, Literal):
            return len(node.bytes)
        if isinstance(node, Sequence):
            return sum(sizes)
        if isinstance(node, Either):
            return min(sizes)
        if isinstance(node, Repeat):
            return node.low * sizes[0] if node.low else 0
        if isinstance(node, Reference):
            return self._circles.setdefault(node, math.inf)
        return 1

    def _behind(self, config: Config, byte: int) -> Iterator[Config]:
        for accepted, rest in self._heads(config):
            if byte in accepted:
                yield rest

    def _heads(self, config: Config) -> Iterator[tuple[frozenset[int] | bytes, Config]]:
        """The bytes that may come next, each with what comes behind."""
        waiting = [config]
        while waiting:
            item = waiting.pop()
            if item is None:
                continue
            node, rest = item
            if isinstance(node, Literal):
                if len(node.bytes) > 1:
                    yield node.bytes[:1], (node.tail, rest)
                elif node.bytes:
                    yield node.bytes, rest
                else:
                    waiting.append(rest)
            elif isinstance(node, OneOf):
                yield node.accepted, rest
            elif isinstance(node, Sequence):
                for part in reversed(node.parts):
                    rest = (part, rest)
                waiting.append(rest)
            elif isinstance(node, Either):
                waiting += [(choice, rest) for choice in node.choices]
            elif isinstance(node, Repeat):
                if not node.low:
                    waiting.append(rest)
                if node.high is None or node.high > 0:
                    waiting.append((node.part, (node.more, rest)))
            elif isinstance(node, Reference):
                assert node.node is not None
                waiting.append((node.node, rest))


def _parts(node: Node) -> tuple[Node, ...]:
    if isinstance(node, Sequence):
        return node.parts
    if isinstance(node, Either):
        return node.choices
    return (node.part,) if isinstance(node, Repeat) else ()


# ---- JSON ----------------------------------------------------------------------------------------------------------

_DIGIT = OneOf(b"0123456789")


def _bytes(first: int, last: int) -> OneOf:
    return OneOf(bytes(range(first, last + 1)))


_MORE = _bytes(0x80, 0xBF)
_CHARACTER = Either(  # UTF-8, as RFC 3629 has it
    OneOf(bytes(set(range(0x20, 0x80)) - set(b'"\\'))),
    Sequence(Literal("\\"), OneOf(b'"\\/bfnrt')),  # not \u: half a surrogate pair is no text
    Sequence(_bytes(0xC2, 0xDF), _MORE),
    Sequence(Literal(b"\xe0"), _bytes(0xA0, 0xBF), _MORE),
    Sequence(OneOf(bytes([*range(0xE1, 0xED), 0xEE, 0xEF])), _MORE, _MORE),
    Sequence(Literal(b"\xed"), _bytes(0x80, 0x9F), _MORE),
    Sequence(Literal(b"\xf0"), _bytes(0x90, 0xBF), _MORE, _MORE),
    Sequence(_bytes(0xF1, 0xF3), _MORE, _MORE, _MORE),
    Sequence(Literal(b"\xf4"), _bytes(0x80, 0x8F), _MORE, _MORE),
)
_INTEGER = Sequence(
    Either(Literal("0"), Sequence(Repeat(Literal("-"), 0, 1), OneOf(b"123456789"), Repeat(_DIGIT, 0, 14)))
)
_NUMBER = Sequence(_INTEGER, Repeat(Sequence(Literal("."), Repeat(_DIGIT, 1, 8)), 0, 1))
_BOOLEAN = Either(Literal("true"), Literal("false"))
_NULL = Literal("null")
_LONGEST = 1 << 16
"""Lengths beyond this are not counted."""


def _string(low: int = 0, high: int | None = None) -> Node:
    return Sequence(Literal('"'), Repeat(_CHARACTER, low, high), Literal('"'))


def _listed(begin: str, item: Node, end: str, low: int = 0, high: int | None = None) -> Node:
    """``item``s with commas between them."""
    if high == 0:
        return Literal(begin + end)
    rest = Repeat(Sequence(Literal(", "), item), max(0, low - 1), None if high is None else high - 1)
    some = Sequence(Literal(begin), item, rest, Literal(end))
    return some if low else Either(Literal(begin + end), some)


def _value() -> Node:
    reference = Reference()
    pair = Sequence(_string(), Literal(": "), reference)
    objects, arrays = _listed("{", pair, "}"), _listed("[", reference, "]")
    reference.node = Either(objects, arrays, _string(), _NUMBER, _BOOLEAN, _NULL)
    return reference


_ANY = _value()
_OBJECT = _listed("{", Sequence(_string(), Literal(": "), _ANY), "}")


def json_grammar(schema: Any) -> Node:
    """The JSON values that have the shape ``schema`` asks for, written as ``json.dumps`` writes them.

    What it says beyond that, or not as JSON Schema says it, leaves the value free.
    """
    return _Compiler(schema).compile(schema)


def any_object() -> Node:
    return _OBJECT


class _Compiler:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._references: dict[str, Reference] = {}

    def compile(self, schema: Any) -> Node:
        if not isinstance(schema, dict):
            return _ANY
        if isinstance(schema.get("$ref"), str):
            return self._reference(schema["$ref"])
        if isinstance(schema.get("enum"), list) and schema["enum"]:
            return Either(*[_constant(value) for value in schema["enum"]])
        if "const" in schema:
            return _constant(schema["const"])
        for word in ("anyOf", "oneOf"):
            if isinstance(schema.get(word), list) and schema[word]:
                return Either(*[self.compile(choice) for choice in schema[word]])
        if isinstance(schema.get("allOf"), list) and schema["allOf"]:
            return self._all(schema)
        kind = schema.get("type") or ("object" if "properties" in schema else None)
        if isinstance(kind, list):
            return Either(*[self._of_type(one, schema) for one in kind]) if kind else _ANY
        node = self._of_type(kind, schema)
        return Either(node, _NULL) if schema.get("nullable") is True else node

    def _of_type(self, kind: Any, schema: dict[str, Any]) -> Node:
        if kind == "string":
            return _string(_count(schema, "minLength") or 0, _count(schema, "maxLength"))
        if kind == "array":
            return self._array(schema)
        if kind == "object":
            return self._object(schema)
        return {"integer": _INTEGER, "number": _NUMBER, "boolean": _BOOLEAN, "null": _NULL}.get(str(kind), _ANY)

    def _array(self, schema: dict[str, Any]) -> Node:
        first = schema.get("prefixItems")
        if isinstance(first, list) and first:
            parts: list[Node] = [Literal("[")]
            for number, item in enumerate(first):
                parts += [Literal(", " if number else ""), self.compile(item)]
            return Sequence(*parts, Literal("]"))
        low, high = _count(schema, "minItems") or 0, _count(schema, "maxItems")
        return _listed("[", self.compile(schema.get("items")), "]", low, high)

    def _object(self, schema: dict[str, Any]) -> Node:
        properties = schema.get("properties")
        if not isinstance(properties, dict):
            values = schema.get("additionalProperties")
            value = self.compile(values) if isinstance(values, dict) else _ANY
            return _listed("{", Sequence(_string(), Literal(": "), value), "}")
        required = schema.get("required")
        required = set(required) if isinstance(required, list) else set()
        # from the last property backwards: what may come behind it, if something was written before it or not
        behind = {False: Literal("}"), True: Literal("}")}
        rest: dict[bool, Node] = dict(behind)
        for name, value in reversed(properties.items()):
            node, key = self.compile(value), json.dumps(name, ensure_ascii=False)
            with_it: dict[bool, Node] = {
                started: Sequence(Literal(f"{', ' if started else ''}{key}: "), node, rest[True])
                for started in (False, True)
            }
            rest = with_it if name in required else {s: Either(with_it[s], rest[s]) for s in (False, True)}
        return Sequence(Literal("{"), rest[False])

    def _all(self, schema: dict[str, Any]) -> Node:
        merged: dict[str, Any] = {k: v for k, v in schema.items() if k != "allOf"}
        for part in schema["allOf"]:
            part = self._look_up(part["$ref"]) if isinstance(part, dict) and "$ref" in part else part
            if not isinstance(part, dict):
                return _ANY
            for name, value in part.items():
                if name == "properties":
                    merged[name] = {**merged.get(name, {}), **value}
                elif name == "required":
                    merged[name] = [*merged.get(name, []), *value]
                else:
                    merged.setdefault(name, value)
        return self.compile(merged)

    def _reference(self, path: str) -> Node:
        if path not in self._references:
            reference = self._references[path] = Reference()
            reference.node = self.compile(self._look_up(path))
        return self._references[path]

    def _look_up(self, path: str) -> Any:
        value = self._root
        for name in path.removeprefix("#").strip("/").split("/"):
            if name and isinstance(value, dict):
                value = value.get(name.replace("~1", "/").replace("~0", "~"))
        return value


def _constant(value: Any) -> Node:
    return Literal(json.dumps(value, ensure_ascii=False))


def _count(schema: dict[str, Any], word: str) -> int | None:
    count = schema.get(word)
    return count if isinstance(count, int) and 0 <= count <= _LONGEST else None
