"""A method as one value: its encoder, its selector, its recompute step and its attention."""

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

    ``positions``: ``"global"``, every token at its position in the prompt; ``"shared"``, all chunks start at the same
    position, and the question follows the longest (APE). ``prefix_cache``: reuse only KV behind exactly the same tokens
    and compute the rest; the other parts are not used then. ``fit``: the rule that chooses among the fused variants of
    a chunk; None takes its KV computed in isolation. ``reorder``: before anything is recomputed, move the chunks with
    most attention from the question next to it (InfoFlow's option; which end is our reading). ``recompute_ratio``: the
    default share of context tokens to recompute. With ``fitted_ratio``, that share is for a prompt whose chunks were
    all encoded in isolation, ``fitted_ratio`` for one whose chunks all follow the context they were computed in; in
    between, the share is linear in `kv.fit.context_fit`. ``about``: one line for the overview, with the source.
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

    def ratio(self, requested: float, fit: float) -> float:
        """The share of context tokens to recompute if the chunks' contexts fit the prompt by ``fit`` (0..1)."""
        return requested if self.fitted_ratio is None else requested + (self.fitted_ratio - requested) * fit

    @property
    def strategy(self) -> str:
        """The prefill strategy of this method: the one that a part of it names, else ``"compose"``."""
        named = (getattr(part, "strategy", None) for part in (self.prefix_cache, self.encode, self.select))
        return next(filter(None, named), "compose")

    @property
    def ahead(self) -> bool:
        """Whether chunks are encoded at ingestion, before any prompt contains them."""
        return self.strategy not in ("prefix", "harvest")


def check_ratio(ratio: Any, name: str = "recompute_ratio") -> float:
    """``ratio`` as a float. Raises `ConfigurationError` unless it is a number in 0..1; ``name`` is for the message."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 <= ratio <= 1.0:
        raise ConfigurationError(f"{name} must be a number from 0 (plain reuse) to 1 (full prefill), not {ratio!r}")
    return float(ratio)
