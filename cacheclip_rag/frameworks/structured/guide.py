"""Decoding constrained by a grammar, for forced tool calls and structured output."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .dialect import Dialect
from .grammar import Either, Follower, Literal, Node, State, json_grammar
from .grammar import Sequence as InOrder

if TYPE_CHECKING:
    from torch import Tensor

    from ...model.backbone import Backbone

_FIRST_LOOK = 64
"""The likeliest tokens, among which nearly always one is allowed."""


class Guide:
    """Restricts one answer to a grammar, and ends it within its ``max_new_tokens`` wherever that is possible.

    It is both a logits processor and, in `done`, a stopping criterion of transformers' ``generate``.
    """

    def __init__(self, backbone: Backbone, grammar: Node, max_new_tokens: int, sample: bool = False) -> None:
        self._follower = Follower(grammar)
        self._state: State = self._follower.start
        self._vocabulary = _vocabulary(backbone)
        self._ends = _end_tokens(backbone)
        self._sample = sample
        self._tokens_left = max_new_tokens
        self._read: int | None = None

    def options(self) -> dict[str, Any]:
        """For ``Engine.stream``."""
        return {"logits_processor": [self], "stopping_criteria": [self.done]}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leaves of ``scores [1, V]`` the tokens that may come next: the likeliest one, or several for sampling."""
        self._follow(input_ids)
        order = scores[0].topk(min(_FIRST_LOOK, scores.shape[-1])).indices.tolist()
        allowed = self._allowed(order)
        if not allowed:
            allowed = self._allowed(scores[0].argsort(descending=True).tolist()[len(order) :], enough=1)
        if not allowed:  # only a vocabulary that lacks single characters leads here; the parser will complain
            return scores
        guided = scores.new_full(scores.shape, float("-inf"))
        guided[0, allowed] = scores[0, allowed].clamp_min(-1e30)
        return guided

    def done(self, input_ids: Tensor, scores: Any, **_: Any) -> bool:
        self._follow(input_ids)
        return self._follower.finished(self._state)

    def _follow(self, input_ids: Tensor) -> None:
        length = input_ids.shape[-1]
        if self._read is None:  # called for the first time: by the processor, with the prompt only
            self._read = length
        for token in input_ids[0, self._read : length].tolist():
            self._state = self._follower.run(self._state, self._vocabulary.bytes(token))
            self._tokens_left -= 1
        self._read = length

    def _allowed(self, tokens: Sequence[int], enough: int | None = None) -> list[int]:
        enough = enough or (len(tokens) if self._sample else 1)
        follower, allowed = self._follower, []
        left, tokens_left = follower.left(self._state), self._tokens_left - 1
        begins: dict[int, bool] = {}
        for token in tokens:
            text = self._vocabulary.bytes(token)
            if not text:
                fits = token in self._ends and follower.complete(self._state)
            else:
                if text[0] not in begins:
                    begins[text[0]] = bool(follower.step(self._state, text[0]))
                fits = begins[text[0]] and self._leads_home(text, left, tokens_left)
            if fits:
                allowed.append(token)
                if len(allowed) >= enough:
                    break
        return allowed

    def _leads_home(self, text: bytes, left: float, tokens_left: int) -> bool:
        """Whether the end can still be reached: at worst, every further byte takes a token of its own."""
        behind = self._follower.run(self._state, text)
        if not behind:
            return False
        to_go = self._follower.left(behind)
        return to_go <= tokens_left or to_go < left


def call_grammar(dialect: Dialect, tools: Sequence[dict[str, Any]], name: str | None = None) -> Node:
    """One call of one of these tools, or of the one called ``name``, as the model's template writes it."""
    calls = []
    for tool in tools:
        function = tool["function"]
        if name not in (None, function["name"]):
            continue
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        arguments = json_grammar({"type": "string"} if dialect.arguments_as_text else parameters)
        head = f'{{"{dialect.name_key}": {json.dumps(function["name"], ensure_ascii=False)}, '
        calls.append(InOrder(Literal(f'{head}"{dialect.arguments_key}": '), arguments, Literal("}")))
    return InOrder(Literal(dialect.opening), Either(*calls), Literal(dialect.closing))


# ---- the bytes of tokens -------------------------------------------------------------------------------------------


class _Vocabulary:
    """Every token's bytes; b"" for control tokens and for what is no token."""

    def __init__(self, backbone: Backbone) -> None:
        tokenizer = backbone.tokenizer
        decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder")
        table = _byte_level() if "ByteLevel" in json.dumps(decoder) else None
        added = tokenizer.added_tokens_decoder
        self._bytes: dict[int, bytes] = {}
        for text, token in tokenizer.get_vocab().items():
            if token in added:
                self._bytes[token] = b"" if added[token].special else added[token].content.encode()
            elif table is not None:
                self._bytes[token] = bytes(table[c] for c in text if c in table)
            elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                self._bytes[token] = bytes([int(text[3:5], 16)])
            else:
                self._bytes[token] = text.replace("\u2581", " ").encode("utf-8", "surrogatepass")

    def bytes(self, token: int) -> bytes:
        return self._bytes.get(token, b"")


_vocabularies: weakref.WeakKeyDictionary[Backbone, _Vocabulary] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _vocabulary(backbone: Backbone) -> _Vocabulary:
    with _lock:
        if backbone not in _vocabularies:
            _vocabularies[backbone] = _Vocabulary(backbone)
        return _vocabularies[backbone]


def _byte_level() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for (as GPT-2 has it)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _end_tokens(backbone: Backbone) -> set[int]:
    ends = backbone.model.generation_config.eos_token_id
    if ends is None:
        ends = backbone.tokenizer.eos_token_id
    return set(ends if isinstance(ends, list) else [ends]) - {None}
