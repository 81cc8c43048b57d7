"""How a request wants its answer decoded: greedily or sampled, with the options of ``model.generate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ConfigurationError

_ELSEWHERE: Mapping[str, tuple[Any, str]] = {
    "num_beams": (1, "one beam is decoded on one canvas"),
    "num_return_sequences": (1, "ask once for each answer"),
    "penalty_alpha": (0, "answers are greedy or sampled"),
    "dola_layers": (None, "answers are greedy or sampled"),
    "stop_strings": (None, "give them as stop=[...]"),
}
"""Options that ask for another loop than ours: the value that does not, and what to do instead."""


def decoding(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with what they leave open: greedy unless a temperature above 0 or ``do_sample=True`` is given.

    Raises ConfigurationError for options that contradict each other, or that another way of decoding needs.
    """
    settled = dict(options)
    if settled.get("temperature") and "do_sample" not in settled:
        settled["do_sample"] = True
    if settled.get("do_sample") and settled.get("temperature") == 0:
        raise ConfigurationError("do_sample=True needs a temperature above 0; greedy decoding is do_sample=False")
    if not settled.setdefault("do_sample", False):
        settled.update(temperature=None, top_p=None, top_k=None)
    for name, (harmless, instead) in _ELSEWHERE.items():
        if settled.get(name) not in (None, harmless):
            raise ConfigurationError(f"{name}={settled[name]!r} is not possible here: {instead}")
    return settled
