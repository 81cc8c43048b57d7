"""The commands ``cacheclip tune ...``: from their arguments to a trained folder with a card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from cacheclip_eval.data import Item, spread
from cacheclip_eval.sources import Source, sources

from cacheclip_rag.errors import ConfigurationError, NotComposable
from cacheclip_rag.methods import resolve
from cacheclip_rag.model.adapter import library_version, read_card
from cacheclip_rag.model.backbone import Backbone, best_dtype
from cacheclip_rag.weights.pull import resolve as resolve_weights

from . import headings
from .blocks import Blocks
from .card import write_card
from .data import split
from .head import Head
from .headings import Headings
from .loop import Outcome, Settings, Show, Task, train
from .lora import Lora, Soft
from .packet import Packet
from .selection import KEEPING, Selection
from .teacher import Teacher

SCHEMES = {"blockattention": True, "turborag": False}
"""The methods whose weights `tune blocks` trains, and whether full attention is trained jointly."""

HELD_OUT = "held-out.jsonl"


class Trainee(Protocol):
    """What a command trains. ``unit``: what its losses are, for the card."""

    unit: str

    def fits(self, item: Item) -> bool:
        """Whether an item can be trained on: its prompt is within the context length."""

    def task(
        self, train: Sequence[Item], stop: Sequence[Item], save: Callable[[Sequence[Mapping[str, Any]]], None]
    ) -> Task: ...

    def report(self, items: Sequence[Item]) -> Mapping[str, float]:
        """Losses tuned and untuned, by name."""

    def save(self, folder: Path) -> None:
        """Write what is trained."""

    def load(self, folder: Path) -> None:
        """Take what `save` wrote."""


@dataclass(frozen=True)
class Plan:
    """What to train. ``kind``: the command; ``uses``: the method string, with ``FOLDER`` for the result; ``options``:
    those of this kind, part of the training's identity; ``open``: loads the models. ``stop_items``: how many held-out
    questions are looked at; ``hours``: of this run; ``answers``: whether questions need one;
    ``checkpointing``: see `Lora`.
    """

    kind: str
    uses: str
    sources: Sequence[Source | Headings]
    out: Path
    settings: Settings
    options: Mapping[str, Any]
    open: Callable[[Plan], tuple[Trainee, Mapping[str, Any]]]
    stop_documents: int = 3
    report_documents: int = 6
    stop_items: int = 32
    hours: float | None = None
    answers: bool = True
    checkpointing: bool = False


def blocks(data: Sequence[str], out: Path, settings: Settings, options: Mapping[str, Any], **more: Any) -> Plan:
    """The plan of ``tune blocks``. ``options``: model, method, joint (None: as its paper), rank, mixed (None: where the
    hardware does). Checked before a model is loaded. Raises `ConfigurationError`.
    """
    method, joint = options["method"], options["joint"]
    recipe = resolve(method)
    if recipe.name not in SCHEMES:
        raise ConfigurationError(f"tune blocks trains for {' or '.join(SCHEMES)}, not {recipe.name}")
    if getattr(recipe.encode, "adapter", None) is not None:
        raise ConfigurationError("tune blocks trains an adapter: leave adapter= out of --method")
    options = {**options, "joint": SCHEMES[recipe.name] if joint is None else joint}
    uses = f"{method}{',' if ':' in method else ':'}adapter=FOLDER"

    def opened(plan: Plan) -> tuple[Trainee, Mapping[str, Any]]:
        lora = _lora(options["model"], plan)
        return Blocks(lora, recipe, options["joint"]), _primary(plan, lora)

    return _plan("blocks", uses, data, out, settings, options, opened, **more)


def links(data: Sequence[str], out: Path, settings: Settings, options: Mapping[str, Any], **more: Any) -> Plan:
    """The plan of ``tune links``. ``options``: model, links (how many behind each chunk), rank (of LoRA, 0 for none),
    mixed. Raises `ConfigurationError`.
    """
    if not 1 <= options["links"] <= 5:
        raise ConfigurationError(f"--links is from 1 to 5, not {options['links']}")

    def opened(plan: Plan) -> tuple[Trainee, Mapping[str, Any]]:
        lora = _lora(options["model"], plan, soft=Soft("links", 0, options["links"]))
        return Blocks(lora, resolve("kvlink"), joint=False), _primary(plan, lora)

    return _plan("links", "kvlink:adapter=FOLDER", data, out, settings, options, opened, **more)


def packet(data: Sequence[str], out: Path, settings: Settings, options: Mapping[str, Any], **more: Any) -> Plan:
    """The plan of ``tune packet``. ``options``: model, header and trailer (soft tokens of each), answer (tokens of the
    model's own that are distilled, at most), mixed. Raises `ConfigurationError`.
    """
    if min(options["header"], options["trailer"]) < 0 or not options["header"] + options["trailer"]:
        raise ConfigurationError("--header and --trailer are numbers of soft tokens, at least 1 together")

    def opened(plan: Plan) -> tuple[Trainee, Mapping[str, Any]]:
        lora = _lora(options["model"], plan, soft=Soft("packet", options["header"], options["trailer"]))
        return Packet(lora, resolve("kvpacket"), options["answer"]), _primary(plan, lora)

    uses = "kvpacket:adapter=FOLDER"
    return _plan("packet", uses, data, out, settings, options, opened, answers=False, **more)


def auxiliary(data: Sequence[str], out: Path, settings: Settings, options: Mapping[str, Any], **more: Any) -> Plan:
    """The plan of ``tune auxiliary``. ``options``: model (the primary), auxiliary, layers, rank, mixed. Raises
    `ConfigurationError`.
    """
    if options["layers"] not in ("last", "upper"):
        raise ConfigurationError(f"--layers is last or upper, not {options['layers']}")
    uses = f"cacheclip:auxiliary=FOLDER{'' if options['layers'] == 'last' else ',layers=upper'}"

    def opened(plan: Plan) -> tuple[Trainee, Mapping[str, Any]]:
        teacher, lora = _teacher(plan), _lora(options["auxiliary"], plan, KEEPING)
        return Selection(lora, teacher, options["layers"]), _fitted(plan, teacher, lora.backbone)

    return _plan("auxiliary", uses, data, out, settings, options, opened, answers=False, **more)


def head(data: Sequence[str], out: Path, settings: Settings, options: Mapping[str, Any], **more: Any) -> Plan:
    """The plan of ``tune head``. ``options``: model (the primary), auxiliary, hidden (rows). Raises
    `ConfigurationError`.
    """

    def opened(plan: Plan) -> tuple[Trainee, Mapping[str, Any]]:
        teacher, backbone = _teacher(plan), Backbone.load(resolve_weights(options["auxiliary"]), dtype="float32")
        return Head(backbone, teacher, options["hidden"], settings.seed), _fitted(plan, teacher, backbone)

    return _plan("head", "cacheclip:auxiliary=FOLDER", data, out, settings, options, opened, answers=False, **more)


def _teacher(plan: Plan) -> Teacher:
    primary = Backbone.load(resolve_weights(plan.options["model"]))
    if primary.obstacle is not None:
        raise NotComposable(f"{primary.obstacle}: no method selects tokens for it")
    return Teacher(primary)


def _primary(plan: Plan, lora: Lora) -> dict[str, Any]:
    return {"primary": {"name": plan.options["model"], **lora.backbone.origin()}}


def _fitted(plan: Plan, teacher: Teacher, auxiliary: Backbone) -> dict[str, Any]:
    return {
        "primary": {"name": plan.options["auxiliary"], **auxiliary.origin()},
        "fitted_to": {"name": plan.options["model"], **teacher.backbone.origin()},
    }


def _plan(
    kind: str,
    uses: str,
    data: Sequence[str],
    out: Path,
    settings: Settings,
    options: Mapping[str, Any],
    opened: Callable[[Plan], tuple[Trainee, Mapping[str, Any]]],
    **more: Any,
) -> Plan:
    if not data:
        raise ConfigurationError("give at least one data set, before the options: FILE or FOLDER")
    documents = {} if more.get("answers", True) else {spec: headings.source(spec) for spec in data}
    found: list[Source | Headings] = [one for one in documents.values() if one is not None]
    found += sources([spec for spec in data if documents.get(spec) is None])
    if len({source.name for source in found}) < len(found):
        raise ConfigurationError("two data sets have one name: write name=FILE, or rename the folder")
    if generated := [source.name for source in found if source.path is None]:
        raise ConfigurationError(f"{', '.join(generated)}: training takes files and folders of questions")
    if read_card(out).get("finished"):
        raise ConfigurationError(f"{out} holds a finished training: give another --out")
    return Plan(kind, uses, found, out, settings, options, opened, **more)


def _lora(name: str, plan: Plan, attention: str = "sdpa", soft: Soft | None = None) -> Lora:
    backbone, mixed = Backbone.load(resolve_weights(name), dtype="float32"), plan.options["mixed"]
    mixed = best_dtype(backbone.device) == torch.bfloat16 if mixed is None else mixed
    rank = plan.options.get("rank", 0)
    return Lora(backbone, rank, plan.settings.seed, mixed, attention, plan.checkpointing, soft)


def execute(plan: Plan, show: Show) -> Outcome:
    """Train, and write the folder: adapter, card, and the items to report on (``held-out.jsonl``).

    The adapter is the best so far, also while training goes on. Raises what `train` and `split` raise.
    """
    sets = {source.name: source.all() for source in plan.sources}
    parts = split(sets, plan.stop_documents, plan.report_documents, plan.settings.seed, plan.answers)
    show("opening the model", 0, 0)
    trainee, models = plan.open(plan)
    items = {
        "train": [item for item in parts.train if trainee.fits(item)],
        "stop": spread([item for item in parts.stop if trainee.fits(item)], plan.stop_items),
    }
    for name, found in items.items():
        if not found:
            raise ConfigurationError(f"no question to {name} fits the model's context length: ?passages=4 takes fewer")
    identity = {
        "kind": plan.kind,
        **plan.options,
        **models,
        "documents": parts.documents,
        "items": {name: [item.id for item in found] for name, found in items.items()},
    }
    plan.out.mkdir(parents=True, exist_ok=True)
    _write_items(plan.out / HELD_OUT, parts.report)

    def save(history: Sequence[Mapping[str, Any]]) -> None:
        trainee.save(plan.out)
        counts = {name: len(found) for name, found in items.items()} | {"report": len(parts.report)}
        training = {name: history[-1][name] for name in ("step", "tokens", "seconds")}
        card = {
            "kind": plan.kind,
            "finished": False,
            "uses": plan.uses,
            "library": library_version(),
            **models,
            "data": {"documents": parts.documents, **counts},
            "settings": {**asdict(plan.settings), **plan.options},
            "training": {**training, "unit": trainee.unit, "history": list(history)},
        }
        write_card(plan.out, card)

    task = trainee.task(items["train"], items["stop"], save)
    outcome = train(task, plan.settings, plan.out, identity, plan.hours, show)
    if outcome.ended != "paused" and outcome.gained:
        show("looking at questions to report on", 0, 0)
        trainee.load(plan.out)
        reported = spread([item for item in parts.report if trainee.fits(item)], 2 * plan.stop_items)
        gained = trainee.report(reported) if reported else {}
        write_card(plan.out, {**read_card(plan.out), "finished": True, "report": gained})
    return outcome


def _write_items(path: Path, items: Sequence[Item]) -> None:
    """Items in the format of `cacheclip_eval.data.read`, for ``cacheclip eval``."""
    lines = []
    for item in items:
        passages = [{"title": p.title, "text": p.text, "is_supporting": p.supporting} for p in item.passages]
        record = {"id": item.id, "question": item.question, "answers": item.answers, "passages": passages}
        lines.append(json.dumps({**record, "meta": item.meta}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def lines(plan: Plan, outcome: Outcome) -> list[str]:
    """What to print at the end."""
    first, best = outcome.first, outcome.best
    changes = ", ".join(f"{name} {first[name]:.3f} -> {best[name]:.3f}" for name in first)
    rate = outcome.tokens / outcome.seconds * 3600 if outcome.seconds else 0.0
    said = [
        f"{outcome.steps:,} steps, {outcome.tokens:,} tokens, {rate:,.0f} tokens an hour",
        f"on held-out questions: {changes}",
    ]
    if outcome.ended == "paused":
        said.append(f"paused: the same command goes on; the best so far, if anything was gained, is in {plan.out}")
    elif outcome.gained:
        said.append(f'use it as "{plan.uses.replace("FOLDER", str(plan.out))}"')
    else:
        said.append("training lowered the held-out loss at no look, so there is no adapter")
    return said
