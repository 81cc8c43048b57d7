"""What a pilot tries: parameters of a method, chunks fused or not, and ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheclip_rag import spec
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.methods import Method, check_ratio, resolve
from cacheclip_rag.methods.select.query_guided import QueryGuided

from .metrics import LEAST
from .sources import Source, sources

QUERIES = ("question", "last", "both")
BANDS = ((0.44, 0.58), (0.69, 0.83), (0.86, 1.0))
"""Bands of relative depths, equally wide; the middle one is InfoFlow's."""

COLD = "cold"
"""Chunks each by itself; the other contexts are those of `contexts.planner`."""

QUESTIONS = 2 * LEAST
"""Questions needed at least: `LEAST` to choose on, and as many to report on."""

_SET = ("recompute_ratio", "fitted_ratio", "context", "neighbours", "auxiliary")
"""Parameters that the pilot sets."""


@dataclass(frozen=True)
class Setting:
    """A point of the grid: the parameters of the method ``name``, as text, and what chunks are fused with."""

    name: str
    parameters: Mapping[str, str]
    context: str = COLD
    neighbours: int = 10

    @property
    def method(self) -> str:
        """As ``method=`` takes it."""
        return self._written({})

    @property
    def label(self) -> str:
        """As the evaluation names it."""
        return self._written({} if self.context == COLD else {"context": self.context, "neighbours": self.neighbours})

    def _written(self, more: Mapping[str, Any]) -> str:
        parameters = sorted({**self.parameters, **more}.items())
        return f"{self.name}:{','.join(f'{name}={text}' for name, text in parameters)}"


@dataclass(frozen=True)
class Plan:
    """What to try. ``name`` and ``given``: the method, and parameters of it that stay as they are; ``questions``: in
    all, spread over the data sets; ``ratios``: in ascending order; ``neighbours``: of a fused chunk, at most.
    """

    sources: Sequence[Source]
    name: str
    given: Mapping[str, str]
    model: str
    auxiliary: str
    out: Path
    questions: int
    ratios: Sequence[float]
    neighbours: int = 10
    store: Path | None = None

    @property
    def method(self) -> Method:
        return resolve(self.name, **{name: spec.value(name, text) for name, text in self.given.items()})

    def setting(self, chosen: Mapping[str, str], context: str, ratio: float) -> Setting:
        """``ratio`` is for chunks by themselves. A method that recomputes less of fused ones that fit does so in the
        same proportion as by default.
        """
        method, parameters = self.method, {**self.given, **chosen, "recompute_ratio": f"{ratio:g}"}
        if method.fitted_ratio is not None:
            parameters["fitted_ratio"] = f"{ratio * method.fitted_ratio / method.recompute_ratio:.3g}"
        if method.ahead:
            parameters["fused"] = str(context != COLD)
        return Setting(self.name, parameters, context, self.neighbours)

    def choosers(self) -> dict[str, list[dict[str, str]]]:
        """What may choose tokens, by step: parameters, the first ones as they are. None where the user said it."""
        select = self.method.select
        if not isinstance(select, QueryGuided):
            return {}
        ways: dict[str, list[dict[str, str]]] = {
            "queries": [{"queries": each} for each in QUERIES if each != select.queries],
            "layers": [{"layers": f"({low},{high})"} for low, high in BANDS if (low, high) != select.layers],
        }
        return {step: [{}, *each] for step, each in ways.items() if step not in self.given}


def plan(
    data: Sequence[str],
    method: str,
    *,
    model: str,
    auxiliary: str,
    out: Path,
    questions: int,
    ratios: str,
    neighbours: int = 10,
    store: Path | None = None,
) -> Plan:
    """Check the arguments, before a model is loaded. Raises `ConfigurationError`."""
    if not data:
        raise ConfigurationError("give at least one data set, before the options: FILE or FOLDER")
    found = sources(data)
    if generated := [source.name for source in found if source.path is None]:
        raise ConfigurationError(f"{', '.join(generated)}: a pilot takes files and folders of your own questions")
    name, given = spec.parse(method)
    if "@" in name or set(_SET) & set(given):
        raise ConfigurationError(
            f'"{method}": leave its ratio, context and auxiliary model out; --ratios, --neighbours and --auxiliary say '
            "what is tried"
        )
    made = Plan(found, name, given, model, auxiliary, out, questions, _ratios(ratios), neighbours, store)
    chosen = made.method  # raises for an unknown method or parameter
    if chosen.strategy not in ("compose", "harvest"):
        raise ConfigurationError(f"{name} answers as full prefill does: there is nothing to choose")
    if not 0.0 < chosen.recompute_ratio < 1.0:
        raise ConfigurationError(f"{name} recomputes nothing, so that there is no ratio to choose: try --method auto")
    if "fused" in given and chosen.fit is not None:
        raise ConfigurationError(f'"{method}": leave fused= out, or write fused=False to try no fused chunks')
    if chosen.select.needs_auxiliary and not auxiliary:
        raise ConfigurationError(f"{name} needs an auxiliary model: --auxiliary NAME")
    if questions < QUESTIONS:
        raise ConfigurationError(
            f"--questions {questions} are too few: {QUESTIONS} at least, half to choose on and half to report on"
        )
    return made


def _ratios(text: str) -> tuple[float, ...]:
    try:
        ratios = tuple(sorted({check_ratio(float(part)) for part in text.split(",")}))
    except (ValueError, ConfigurationError):
        ratios = ()
    if not ratios or ratios[0] == 0.0 or ratios[-1] == 1.0:
        raise ConfigurationError(f'--ratios are numbers between 0 and 1, as in 0.05,0.1, not "{text}"')
    return ratios
