"""The commands ``cacheclip tune ...``; the work is done by `cacheclip_train` and, for ``recipe``, by `cacheclip_eval`,
which are imported when one runs.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..errors import ConfigurationError
from .documents import quietly
from .progress import bar, say

app = typer.Typer(
    no_args_is_help=True, help="Train what methods of the literature train, or choose a method's setting. Resumable."
)

SMALL, PRIMARY = "smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"


@dataclass
class Common:
    """The options of every training besides its own; the plan's settings and limits. ``data``: the data sets."""

    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA...",
            help="\\[name=]FILE.jsonl or a folder with a qa.jsonl, as for eval; where no answers are needed, "
            "also a folder of Markdown or reStructuredText, whose headings are the questions.",
        ),
    ] = None
    out: Annotated[Path, typer.Option(help="The folder of the result, its card and its checkpoint.")] = Path()
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-4
    batch: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = 8
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data, at most.")] = 3
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps, at most; the rate decays over them.", show_default="no limit")
    ] = None
    every: Annotated[int, typer.Option(min=1, help="Steps between two looks at held-out questions.")] = 20
    patience: Annotated[int, typer.Option(min=1, help="Looks without a gain that end it.")] = 4
    seed: Annotated[int, typer.Option(help="Of the split, the order and the first weights.")] = 0
    stop_documents: Annotated[int, typer.Option(min=1, help="Documents of each set to stop by.")] = 3
    report_documents: Annotated[int, typer.Option(min=0, help="Documents of each set to report on.")] = 6
    stop_items: Annotated[int, typer.Option(min=1, help="Questions to stop by, spread over them.")] = 32
    hours: Annotated[float | None, typer.Option(min=0.0, help="Pause after so many.", show_default="no limit")] = None


@dataclass
class Tuned:
    """The further options of trainings through a whole model."""

    mixed: Annotated[
        bool | None,
        typer.Option("--mixed/--no-mixed", help="Multiply in bfloat16.", show_default="where the hardware does"),
    ] = None
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Compute activations twice: half the memory, a third more time."),
    ] = False


Rank = Annotated[int, typer.Option(min=1, help="LoRA's rank.")]
Model = Annotated[str, typer.Option(help="The model that is tuned.")]
Primary = Annotated[str, typer.Option(help="The model that it selects tokens for.")]

_LIMITS = ("stop_documents", "report_documents", "stop_items", "hours", "checkpointing")


def trains(whole_model: bool = True, **defaults: Any) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., None]]:
    """Make a command of a function that returns its training's own options: the `Common` ones are added to its own,
    those of `Tuned`, too, for a ``whole_model``, with other ``defaults`` where they are named.
    """

    def command(function: Callable[..., dict[str, Any]]) -> Callable[..., None]:
        own = [
            one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for one in inspect.signature(function, eval_str=True).parameters.values()
        ]
        given = {"out": Path(function.__name__), **defaults}
        common = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=given.get(field.name, field.default),
                annotation=get_type_hints(group, include_extras=True)[field.name],
            )
            for group in ([Common, Tuned] if whole_model else [Common])
            for field in fields(group)
        ]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            options = function(**{one.name: values.pop(one.name) for one in own})
            data, out = values.pop("data") or [], values.pop("out")
            limits = {name: values.pop(name) for name in _LIMITS if name in values}
            if "mixed" in values:
                options["mixed"] = values.pop("mixed")
            work = _training("command")
            settings = _training("loop").Settings(**values)
            _run(work, getattr(work, function.__name__)(data, out, settings, options, **limits))

        run.__signature__ = inspect.Signature([common[0], *own, *common[1:]])  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in [*own, *common]}
        return app.command()(run)

    return command


@trains()
def blocks(
    model: Model = SMALL,
    method: Annotated[
        str, typer.Option(help="blockattention, turborag or turborag:positions=shared.")
    ] = "blockattention",
    joint: Annotated[
        bool | None,
        typer.Option("--joint/--no-joint", help="Train full attention, too.", show_default="for blockattention"),
    ] = None,
    rank: Rank = 16,
) -> dict[str, Any]:
    """Train a LoRA adapter for chunks that are encoded apart: Block-Attention or TurboRAG.

    A prompt's chunks do not see each other in training, as they do not when their KV is reused; the question sees all.
    Ctrl-C or --hours pauses it, and the same command goes on from the last checkpoint. Exit code 1: nothing was gained.
    """
    return {"model": model, "method": method, "joint": joint, "rank": rank}


@trains()
def links(
    model: Model = SMALL,
    links: Annotated[int, typer.Option(help="Link tokens behind each chunk, 1 to 5.")] = 5,
    rank: Annotated[int, typer.Option(min=0, help="LoRA's rank; 0 trains the link tokens alone.")] = 16,
) -> dict[str, Any]:
    """Train link tokens behind chunks that are encoded apart, and a LoRA adapter with them: KVLink.

    Ctrl-C or --hours pauses it, and the same command goes on from the last checkpoint. Exit code 1: nothing was gained.
    """
    return {"model": model, "links": links, "rank": rank}


@trains(lr=1e-3, epochs=10)
def packet(
    model: Annotated[str, typer.Option(help="The model that it is for, which stays as it is.")] = SMALL,
    header: Annotated[int, typer.Option(min=0, help="Soft tokens before each chunk.")] = 8,
    trailer: Annotated[int, typer.Option(min=0, help="Soft tokens behind each chunk.")] = 8,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of the model's own answers, at most.")] = 32,
) -> dict[str, Any]:
    """Train a header and a trailer around chunks, towards what the model says in a full prefill: KV Packet.

    Questions need no answers. Ctrl-C or --hours pauses it, and the same command goes on from the last checkpoint. Exit
    code 1: nothing was gained.
    """
    return {"model": model, "header": header, "trailer": trailer, "answer": answer}


@trains()
def auxiliary(
    model: Primary = PRIMARY,
    auxiliary: Annotated[str, typer.Option(help="The auxiliary model that is tuned.")] = SMALL,
    layers: Annotated[str, typer.Option(help="Its layers that score: last or upper.")] = "last",
    rank: Rank = 8,
) -> dict[str, Any]:
    """Fit an auxiliary model to the model it selects tokens for: LoRA towards that model's attention from the question.

    Ctrl-C or --hours pauses it, and the same command goes on from the last checkpoint. Exit code 1: nothing was gained.
    """
    return {"model": model, "auxiliary": auxiliary, "layers": layers, "rank": rank}


@trains(whole_model=False, lr=3e-3, epochs=20, patience=10)
def head(
    model: Primary = PRIMARY,
    auxiliary: Annotated[str, typer.Option(help="The auxiliary model that it is a head of.")] = SMALL,
    hidden: Annotated[int, typer.Option(min=1, help="Its hidden units.")] = 32,
) -> dict[str, Any]:
    """Fit a small head on a frozen auxiliary model to the model it selects tokens for: minutes instead of hours.

    Ctrl-C or --hours pauses it, and the same command goes on from the last checkpoint. Exit code 1: nothing was gained.
    """
    return {"model": model, "auxiliary": auxiliary, "hidden": hidden}


@app.command()
def recipe(
    data: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATA...", help="\\[name=]FILE.jsonl or a folder with a qa.jsonl, as for eval."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of the recipe and of the rows that it comes from.")] = Path(
        "recipe"
    ),
    model: Annotated[str, typer.Option(help="The model that answers.")] = "qwen2.5-coder-1.5b-instruct",
    method: Annotated[
        str, typer.Option(help="The method; parameters that it is given stay as they are, fused=False included.")
    ] = "auto",
    auxiliary: Annotated[
        str, typer.Option(help="The auxiliary model, for a method that needs one.", show_default="none")
    ] = "",
    questions: Annotated[int, typer.Option(help="In all: half to choose on, half to report on.")] = 24,
    ratios: Annotated[str, typer.Option(help="Ratios to try, of chunks by themselves.")] = "0.05,0.1,0.15,0.2",
    neighbours: Annotated[int, typer.Option(min=1, help="The number of chunks to fuse each one with.")] = 10,
    store: Annotated[
        Path | None, typer.Option(help="Folder that keeps chunk KV.", show_default="none, in memory only")
    ] = None,
) -> None:
    """Find the setting of a method that suits a model and your documents, by the KL from full prefill.

    Tries whose attention chooses and in which layers, then chunks by themselves, fused by similarity and by use, each
    at several ratios. Answers are not needed. Ctrl-C stops it, and the same command goes on. Exit code 1: some
    answers failed.
    """
    grid, pilot, written = map(_evaluation, ("grid", "pilot", "recipe"))
    plan = grid.plan(
        data or [],
        method,
        model=model,
        auxiliary=auxiliary,
        out=out,
        questions=questions,
        ratios=ratios,
        neighbours=neighbours,
        store=store,
    )
    halves = pilot.split(plan.sources, plan.questions)  # aloud: it names the lines that it cannot read
    with quietly():
        record, failed = pilot.execute(plan, *halves, say)
    for line in written.lines(record):
        typer.echo(line)
    if failed:
        say(f"{failed} answers failed; {out / pilot.ROWS} says why, and the same command tries them again")
        raise typer.Exit(1)


def _run(work: Any, plan: Any) -> None:
    with quietly(), bar() as progress:
        outcome = work.execute(plan, progress)
    for line in work.lines(plan, outcome):
        typer.echo(line)
    if outcome.ended != "paused" and not outcome.gained:
        raise typer.Exit(1)


def _training(module: str) -> Any:
    return _tools(f"cacheclip_train.{module}", "tune needs peft: pip install 'cacheclip-rag[train]'")


def _evaluation(module: str) -> Any:
    return _tools(f"cacheclip_eval.{module}", "tune recipe needs cacheclip_eval: install cacheclip-rag as a whole")


def _tools(module: str, needs: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(f"{error}; {needs}") from error
