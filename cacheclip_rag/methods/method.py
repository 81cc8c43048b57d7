"""What a method is: a way of encoding, of selecting, of recomputing and of attending, as one value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..deprecation import renamed_attribute, renamed_parameters
from ..errors import ConfigurationError
from ..kv.encode import Encoder, Isolated
from ..kv.fit import Fit
from ..kv.prefix_caching import PrefixCaching
from .attend.base import Attend, Plain
from .recompute.base import Recompute
from .recompute.once import Once
from .select.base import Selector

Positions = Literal["global", "shared"]


@renamed_parameters(exact="prefix_cache")
@dataclass(frozen=True)
class Method:
    """How chunks are encoded, which tokens are chosen, how they are recomputed, how the question attends.

    ``positions``: ``"global"``, every token at its place in the prompt; ``"shared"``, all chunks from the same position
    on, and the question behind the longest (APE). ``prefix_cache``: reuse only KV of the very tokens that stood before,
    and compute the rest; the other parts are then idle. ``fit``: take the fused variant of a chunk that fits the prompt
    best; None takes its KV computed by itself. ``reorder``: put the chunks the question attends to most next to it
    before anything is recomputed (InfoFlow's option; which end is our reading). ``recompute_ratio``: the share of
    context tokens to recompute unless a request asks for another; with a ``fitted_ratio``, the share for a prompt all
    of whose chunks were computed by themselves, and ``fitted_ratio`` that for one all of whose chunks stand in the
    context they were computed in; between the two in proportion to `kv.fit.context_fit`. ``about``: a line for the
    overview, with the source.
    """

    name: str
    select: Selector
    encode: Encoder = field(default_factory=Isolated)
    recompute: Recompute = field(default_factory=Once)
    attend: Attend = field(default_factory=Plain)
    positions: Positions = "global"
    prefix_cache: PrefixCaching | None = None
    fit: Fit | None = None
    reorder: bool = False
    recompute_ratio: float = 0.2
    fitted_ratio: float | None = None
    about: str = field(default="", repr=False, compare=False)

    exact = renamed_attribute("exact", "prefix_cache")

    @property
    def strategy(self) -> str:
        """The way to a prefill that this method takes: what one of its parts names, else ``"compose"``."""
        named = (getattr(part, "strategy", None) for part in (self.prefix_cache, self.encode, self.select))
        return next(filter(None, named), "compose")

    @property
    def ahead(self) -> bool:
        """Whether chunks are encoded ahead of the prompts they come in."""
        return self.strategy not in ("prefix", "harvest")


def check_ratio(ratio: Any, name: str = "recompute_ratio") -> float:
    """Raises `ConfigurationError`, which calls it ``name``, unless ``ratio`` lies in 0..1."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 <= ratio <= 1.0:
        raise ConfigurationError(f"{name} must be a number from 0 (plain reuse) to 1 (full prefill), not {ratio!r}")
    return float(ratio)
