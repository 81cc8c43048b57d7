"""Systems to compare, and their notation on the command line: ``name[@ratio][:parameter=value,...]``, and sweeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cacheclip_rag import spec
from cacheclip_rag.deprecation import renamed_parameters, warn
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.methods import FUSED, METHODS, Method, check_ratio, resolve
from cacheclip_rag.methods.auxiliary import Auxiliary
from cacheclip_rag.methods.table import RENAMED

from .contexts import SOURCES, Planner

AUXILIARY, CONTEXT, NEIGHBOURS = "auxiliary", "context", "neighbours"
"""Parameters of a system and not of its method: the name of an auxiliary model other than the engine's; and for a
method that takes fused variants, which passages are fused (see `contexts.planner`), and how many neighbours at most.
"""


@renamed_parameters(meet="plan")
@dataclass(frozen=True, eq=False)
class System:
    """A system to compare: a method at a ratio, with the ``label`` that names it in rows and tables.

    ``auxiliary``: an auxiliary model other than the engine's, or its name in ``helper`` until it is loaded.
    ``parameters``: the method's, by name. ``plan``: which passages are fused for an item; it is made of ``context`` and
    ``neighbours`` when the data are loaded.
    """

    label: str
    method: Method | str
    ratio: float | None = None
    auxiliary: Auxiliary | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    helper: str = ""
    context: str = ""
    neighbours: int = 10
    plan: Planner | None = None

    @cached_property
    def recipe(self) -> Method:
        """The method with its parameters. Raises `ConfigurationError` if one of them is unknown."""
        return resolve(self.method, **self.parameters)


@dataclass(frozen=True)
class _Spec:
    """A system as written: parameters are still text."""

    name: str
    ratio: float | None
    parameters: Mapping[str, str]

    @property
    def label(self) -> str:
        ratio = "" if self.ratio is None else f"@{self.ratio:g}"
        parameters = ",".join(f"{name}={text}" for name, text in sorted(self.parameters.items()))
        return f"{self.name}{ratio}{':' if parameters else ''}{parameters}"


VARIANTS = (
    "cacheclip:layers=upper",
    "cacheclip:auxiliary=qwen2.5-coder-0.5b-instruct",
    "infoflow:reorder=True",
    "naive:context=prompts",
    "auto:context=prompts",
    "auto:carry=0,context=prompts",
    "auto:context=use",
    "auto@0.15:carry=0,fused=False",
    "auto@0.15:fused=False",
)
"""Systems that `ALL` compares besides the methods with their defaults: options of interest, and fused chunks."""

ALL = "all"

TRAINED = ("blockattention", "turborag", "kvlink", "kvpacket")
"""Methods that are plain reuse without trained weights, or nothing."""


def everything() -> list[str]:
    """Every registered method that reuses isolated or harvested chunks, and the `VARIANTS`.

    Full prefill always runs, prefix caching gives the same answers, and a method with fused variants needs a
    ``context``; `TRAINED` ones need an adapter.
    """
    kinds = ("compose", "harvest")
    plain = [n for n, m in METHODS.items() if m.strategy in kinds and m.fit is None and n not in TRAINED]
    return [*plain, *VARIANTS]


def parse(specs: Sequence[str], ratio: float | None = None, sweeps: Sequence[str] = ()) -> list[System]:
    """The systems of ``specs``, each once, labelled as written, with sorted parameters.

    ``all`` stands for `everything`. ``ratio`` applies to methods that recompute a share of tokens and have no ratio in
    their spec, except those with a fitted ratio. A sweep, ``name=value,value,...``, makes one system per value of every
    method that has the parameter and no value for it; several sweeps multiply. Plain ``full`` is dropped, because it
    always runs. Values are Python literals or plain words; a prefix is one of `spec.PREFIXES` or quoted text.
    ``auxiliary=NAME`` takes another auxiliary model.

    Raises `ConfigurationError`, with the valid names.
    """
    named = [text for spec in specs for text in (everything() if spec == ALL else [spec])]
    written = [_spec(text) for text in named]
    for text in sweeps:
        written = _swept(written, text)
    if ratio is not None:
        check_ratio(ratio)
        fixed = [_takes_ratio(s) and resolve(s.name).fitted_ratio is None for s in written]
        written = [dataclasses.replace(s, ratio=ratio) if f else s for s, f in zip(written, fixed, strict=True)]
    systems = {one.label: _system(one) for one in written}
    systems.pop("full", None)
    return list(systems.values())


def _spec(text: str) -> _Spec:
    name, parameters = spec.parse(text)
    parameters = {_current(name): value for name, value in parameters.items()}
    name, at, ratio = name.partition("@")
    return _Spec(name.strip(), _ratio(ratio) if at else None, parameters)


def _current(name: str) -> str:
    """A parameter's name; of a former one the new."""
    new = (RENAMED | {"company": CONTEXT}).get(name, name)
    if new != name:
        warn(f"the parameter {name}", new)
    return new


def _swept(specs: Sequence[_Spec], text: str) -> list[_Spec]:
    name, _, rest = text.partition("=")
    name, values = _current(name.strip()), spec.split(rest)
    if not name or not values:
        raise ConfigurationError(f'"{text}": a sweep is written name=value,value,...')

    def takes(one: _Spec) -> bool:
        if name == "ratio":
            return _takes_ratio(one)
        return name in _parameters(resolve(one.name)) and name not in one.parameters

    def given(one: _Spec, value: str) -> _Spec:
        if name == "ratio":
            return dataclasses.replace(one, ratio=_ratio(value))
        return dataclasses.replace(one, parameters={**one.parameters, name: value})

    if not any(map(takes, specs)):
        valid = ["ratio", *sorted({parameter for one in specs for parameter in _parameters(resolve(one.name))})]
        raise ConfigurationError(f'"{text}": no method is left to sweep; their parameters are: {", ".join(valid)}')
    return [new for one in specs for new in ([given(one, value) for value in values] if takes(one) else [one])]


def _takes_ratio(one: _Spec) -> bool:
    return one.ratio is None and 0.0 < resolve(one.name).recompute_ratio < 1.0


def _system(written: _Spec) -> System:
    values = {name: spec.value(name, text) for name, text in written.parameters.items()}
    helper, context = str(values.pop(AUXILIARY, "")), str(values.pop(CONTEXT, ""))
    count = values.pop(NEIGHBOURS, 10)
    if context and context not in SOURCES:
        raise ConfigurationError(f'"{written.label}": context is one of {", ".join(SOURCES)}')
    if not isinstance(count, int) or count < 1:
        raise ConfigurationError(f'"{written.label}": neighbours must be at least 1, not {count!r}')
    if context:
        values.setdefault(FUSED, True)
    system = System(
        written.label, written.name, written.ratio, parameters=values, helper=helper, context=context, neighbours=count
    )
    recipe = system.recipe  # raises for an unknown method or parameter
    if helper and not recipe.select.needs_auxiliary:
        raise ConfigurationError(f'"{written.label}": {written.name} asks no auxiliary model')
    return system


def _parameters(method: Method) -> list[str]:
    return spec.parameters([getattr(method, part.name) for part in dataclasses.fields(method)])


def _ratio(text: str) -> float:
    try:
        return check_ratio(float(text))
    except (ValueError, ConfigurationError) as error:
        raise ConfigurationError(f'a ratio is a number from 0 to 1, not "{text}"') from error
