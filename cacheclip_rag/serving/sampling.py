"""Decoding options of a request, with the names of ``model.generate``: which are valid, and their defaults."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from ..errors import ConfigurationError

log = logging.getLogger("cacheclip_rag")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _share(value: Any) -> bool:
    return _number(value) and 0.0 <= value <= 1.0


OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "question": (lambda v: isinstance(v, str), "the question's text"),
    "method": (lambda v: isinstance(v, str) or hasattr(v, "select"), "a method's name"),
    "recompute_ratio": (_share, "a number from 0 (plain reuse) to 1 (full prefill)"),
    "max_new_tokens": (lambda v: _whole(v) and v >= 1, "a whole number of at least 1"),
    "min_new_tokens": (lambda v: _whole(v) and v >= 0, "a whole number of at least 0"),
    "stop": (lambda v: isinstance(v, (list, tuple)) and all(isinstance(s, str) for s in v), "a string or several"),
    "seed": (
        lambda v: _whole(v) and -(1 << 63) <= v < 1 << 64,
        "a whole number that torch.Generator takes: of 64 bits",
    ),
    "do_sample": (lambda v: isinstance(v, bool), "True or False"),
    "temperature": (lambda v: _number(v) and v >= 0, "a number of at least 0"),
    "top_p": (_share, "a number from 0 to 1"),
    "top_k": (lambda v: _whole(v) and v >= 0, "a whole number of at least 0"),
    "min_p": (_share, "a number from 0 to 1"),
    "typical_p": (_share, "a number from 0 to 1"),
    "repetition_penalty": (lambda v: _number(v) and v > 0, "a number above 0"),
    "no_repeat_ngram_size": (lambda v: _whole(v) and v >= 0, "a whole number of at least 0"),
}
"""The options of a request: for each, a test of its value and what the error message asks for."""

PASSED = {
    *("bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty"),
    *("eos_token_id", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "forced_eos_token_id"),
    *("generation_config", "guidance_scale", "logits_processor", "max_length", "max_time", "num_beams"),
    *("num_return_sequences", "prefix_allowed_tokens_fn", "remove_invalid_values", "renormalize_logits"),
    *("sequence_bias", "stop_strings", "stopping_criteria", "suppress_tokens", "top_h", "watermarking_config"),
}
"""Further options of ``model.generate``, which frameworks pass on unchecked."""

_ELSEWHERE: Mapping[str, tuple[Any, str]] = {
    "num_beams": (1, "one beam is decoded on one canvas"),
    "num_return_sequences": (1, "ask once for each answer"),
    "penalty_alpha": (0, "answers are greedy or sampled"),
    "dola_layers": (None, "answers are greedy or sampled"),
    "stop_strings": (None, "give them as stop=[...]"),
    "generation_config": (None, "give what is in it as options, each by its name"),
    "max_length": (None, "give max_new_tokens, which counts the answer alone"),
    "inputs": (None, "the prompt is the first argument"),
    "input_ids": (None, "the prompt is the first argument, as text"),
    "attention_mask": (None, "one prompt is answered at a time, all of it"),
    "custom_generate": (None, "answers are greedy or sampled"),
}
"""Options that need another decoding loop than ours: the one harmless value, and what to do instead."""


EFFECTIVE = {*OPTIONS, *PASSED, "min_length", "pad_token_id", "bos_token_id", "forced_bos_token_id"}
"""All options that our decoding loop heeds: they become logits processors and stopping criteria of transformers."""

_FILTERS = ("top_p", "top_k", "min_p", "typical_p")
"""Options that sampling alone heeds."""


def check(name: str, value: Any, option: str | None = None) -> None:
    """Raises `ConfigurationError` unless ``value`` is valid for ``option`` (by default ``name``, as in the message)."""
    valid, wanted = OPTIONS[option or name]
    if not valid(value):
        raise ConfigurationError(f"{name} must be {wanted}, not {value!r}")


def decoding(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with defaults filled in: greedy unless a temperature above 0 or ``do_sample=True`` is given.

    Raises `ConfigurationError` for options that are invalid, contradict each other, or need another decoding loop.
    """
    settled = dict(options)
    if settled.get("do_sample") is None:
        settled.pop("do_sample", None)
    for name, value in settled.items():
        if name in OPTIONS and value is not None:
            check(name, value)
    if settled.get("temperature") and "do_sample" not in settled:
        settled["do_sample"] = True
    idle = [f"{name}={settled[name]!r}" for name in _FILTERS if settled.get(name) is not None]
    if idle and "do_sample" not in settled and settled.get("temperature") is None:
        log.warning("%s: no effect in greedy decoding; to sample, give a temperature above 0", ", ".join(idle))
    if settled.get("do_sample") and settled.get("temperature") == 0:
        raise ConfigurationError("do_sample=True needs a temperature above 0; greedy decoding is do_sample=False")
    if not settled.setdefault("do_sample", False):
        settled.update(temperature=None, top_p=None, top_k=None)
    for name, (harmless, instead) in _ELSEWHERE.items():
        if settled.get(name) not in (None, harmless):
            raise ConfigurationError(f"{name}={settled[name]!r} is not possible here: {instead}")
    return settled
