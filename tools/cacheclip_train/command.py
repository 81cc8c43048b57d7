"""The command ``cacheclip tune blocks``: from its arguments to a trained folder with a card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cacheclip_eval.data import Item, spread
from cacheclip_eval.sources import Source, sources

from cacheclip_rag.errors import ConfigurationError, PromptError
from cacheclip_rag.methods import Method, resolve
from cacheclip_rag.model.adapter import library_version, read_card
from cacheclip_rag.model.backbone import Backbone, best_dtype
from cacheclip_rag.weights.pull import resolve as resolve_weights

from .blocks import Adapted, Blocks, report
from .card import write_card
from .data import Split, split
from .loop import Outcome, Settings, Show, train

SCHEMES = {"blockattention": True, "turborag": False}
"""The methods whose weights can be trained, and whether full attention is trained jointly."""

HELD_OUT = "held-out.jsonl"


@dataclass(frozen=True)
class Plan:
    """What to train. ``joint``: full attention, too; ``stop_items``: how many held-out questions are looked at;
    ``mixed``: multiply in bfloat16, None where the hardware does.
    """

    sources: Sequence[Source]
    model: str
    method: Method
    written: str
    out: Path
    joint: bool
    rank: int
    settings: Settings
    stop_documents: int = 3
    report_documents: int = 6
    stop_items: int = 32
    hours: float | None = None
    mixed: bool | None = None


def plan(
    data: Sequence[str],
    method: str,
    *,
    model: str,
    out: Path,
    settings: Settings,
    joint: bool | None = None,
    rank: int = 16,
    stop_documents: int = 3,
    report_documents: int = 6,
    stop_items: int = 32,
    hours: float | None = None,
    mixed: bool | None = None,
) -> Plan:
    """Check the arguments, before a model is loaded. Raises `ConfigurationError`."""
    if not data:
        raise ConfigurationError("give at least one data set, before the options: FILE or FOLDER")
    recipe = resolve(method)
    if recipe.name not in SCHEMES:
        raise ConfigurationError(f"tune blocks trains for {' or '.join(SCHEMES)}, not {recipe.name}")
    if getattr(recipe.encode, "adapter", None) is not None:
        raise ConfigurationError("tune blocks trains an adapter: leave adapter= out of --method")
    found = sources(data)
    if generated := [source.name for source in found if source.path is None]:
        raise ConfigurationError(f"{', '.join(generated)}: training takes files and folders of questions")
    if read_card(out).get("finished"):
        raise ConfigurationError(f"{out} holds a finished training: give another --out")
    joint = SCHEMES[recipe.name] if joint is None else joint
    limits = stop_documents, report_documents, stop_items
    return Plan(found, model, recipe, method, out, joint, rank, settings, *limits, hours, mixed)


def execute(plan: Plan, show: Show) -> Outcome:
    """Train, and write the folder: adapter, card, and the items to report on (``held-out.jsonl``).

    The adapter is the best so far, also while training goes on. Raises what `train` and `split` raise.
    """
    parts = split(
        {source.name: source.all() for source in plan.sources},
        plan.stop_documents,
        plan.report_documents,
        plan.settings.seed,
    )
    show("opening the model", 0, 0)
    backbone = Backbone.load(resolve_weights(plan.model), dtype="float32")
    mixed = best_dtype(backbone.device) == torch.bfloat16 if plan.mixed is None else plan.mixed
    adapted = Adapted(backbone, plan.method, plan.rank, plan.settings.seed, mixed)
    items = {
        "train": _fitting(parts.train, adapted),
        "stop": spread(_fitting(parts.stop, adapted), plan.stop_items),
    }
    for name, found in items.items():
        if not found:
            raise ConfigurationError(f"no question to {name} fits the model's context length: ?passages=4 takes fewer")
    identity = {
        "kind": "blocks",
        "method": plan.written,
        "joint": plan.joint,
        "rank": plan.rank,
        "mixed": mixed,
        "primary": backbone.origin(),
        "documents": parts.documents,
        "items": {name: [item.id for item in found] for name, found in items.items()},
    }
    plan.out.mkdir(parents=True, exist_ok=True)
    _write_items(plan.out / HELD_OUT, parts.report)

    def card(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        counts = {name: len(found) for name, found in items.items()} | {"report": len(parts.report)}
        training = {"history": list(history), "steps": history[-1]["step"], "tokens": history[-1]["tokens"]}
        return {
            "kind": "blocks",
            "finished": False,
            "method": plan.written,
            "library": library_version(),
            "primary": {"name": plan.model, **backbone.origin()},
            "data": {"documents": parts.documents, **counts},
            "settings": {**asdict(plan.settings), "joint": plan.joint, "rank": plan.rank, "mixed": mixed},
            "training": {**training, "seconds": history[-1]["seconds"]},
        }

    def save(history: Sequence[Mapping[str, Any]]) -> None:
        adapted.save(plan.out)
        write_card(plan.out, card(history))

    task = Blocks(adapted, items["train"], items["stop"], plan.joint, save)
    outcome = train(task, plan.settings, plan.out, identity, plan.hours, show)
    if outcome.ended != "paused" and outcome.gained:
        _finish(plan, parts, adapted, show)
    return outcome


def _finish(plan: Plan, parts: Split, adapted: Adapted, show: Show) -> None:
    """Complete the card: what the best adapter does on the questions to report on."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    show("looking at questions to report on", 0, 0)
    set_peft_model_state_dict(adapted.model, load_file(plan.out / "adapter_model.safetensors"))
    items = spread(_fitting(parts.report, adapted), 2 * plan.stop_items)
    written = read_card(plan.out)
    write_card(plan.out, {**written, "finished": True, "report": dict(report(adapted, items)) if items else {}})


def _fitting(items: Sequence[Item], adapted: Adapted) -> list[Item]:
    """The items whose prompt and answer fit into the model's context length."""
    found = []
    for item in items:
        try:
            adapted.rows(item, apart=False)
        except PromptError:
            continue
        found.append(item)
    return found


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
        f"loss on held-out questions: {changes}",
    ]
    if outcome.ended == "paused":
        said.append(f"paused: the same command goes on; the best adapter so far is in {plan.out}")
    elif outcome.gained:
        said.append(f'{plan.out}: method="{plan.written}{":" if ":" not in plan.written else ","}adapter={plan.out}"')
    else:
        said.append("training lowered the held-out loss at no look, so there is no adapter")
    return said
