"""The commands ``cacheclip tune ...``; the work is done by `cacheclip_train` and, for ``recipe``, by `cacheclip_eval`,
which are imported when one runs.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigurationError
from .documents import quietly
from .progress import bar, say

app = typer.Typer(
    no_args_is_help=True, help="Train what methods of the literature train, or choose a method's setting. Resumable."
)

Data = Annotated[
    list[str] | None,
    typer.Argument(metavar="DATA...", help="\\[name=]FILE.jsonl or a folder with a qa.jsonl, as for eval."),
]
Rank = Annotated[int, typer.Option(min=1, help="LoRA's rank.")]
Rate = Annotated[float, typer.Option(help="Learning rate.")]
Batch = Annotated[int, typer.Option(min=1, help="Examples of a step.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the data, at most.")]
Every = Annotated[int, typer.Option(min=1, help="Steps between two looks at held-out questions.")]
Patience = Annotated[int, typer.Option(min=1, help="Looks without a gain that end it.")]
Seed = Annotated[int, typer.Option(help="Of the split, the order and the first weights.")]
StopDocuments = Annotated[int, typer.Option(min=1, help="Documents of each set to stop by.")]
ReportDocuments = Annotated[int, typer.Option(min=0, help="Documents of each set to report on.")]
StopItems = Annotated[int, typer.Option(min=1, help="Questions to stop by, spread over them.")]
Hours = Annotated[float | None, typer.Option(min=0.0, help="Pause after so many.", show_default="no limit")]
Mixed = Annotated[
    bool | None,
    typer.Option("--mixed/--no-mixed", help="Multiply in bfloat16.", show_default="where the hardware does"),
]
Checkpointing = Annotated[
    bool,
    typer.Option("--checkpointing", help="Compute activations twice: half the memory, a third more time."),
]


@app.command()
def blocks(
    data: Data = None,
    out: Annotated[Path, typer.Option(help="The folder of the adapter, its card and its checkpoint.")] = Path("blocks"),
    model: Annotated[str, typer.Option(help="The model that is tuned.")] = "smollm2-135m-instruct",
    method: Annotated[
        str, typer.Option(help="blockattention, turborag or turborag:positions=shared.")
    ] = "blockattention",
    joint: Annotated[
        bool | None,
        typer.Option("--joint/--no-joint", help="Train full attention, too.", show_default="for blockattention"),
    ] = None,
    rank: Rank = 16,
    lr: Rate = 2e-4,
    batch: Batch = 8,
    epochs: Epochs = 3,
    every: Every = 20,
    patience: Patience = 4,
    seed: Seed = 0,
    stop_documents: StopDocuments = 3,
    report_documents: ReportDocuments = 6,
    stop_items: StopItems = 32,
    hours: Hours = None,
    mixed: Mixed = None,
    checkpointing: Checkpointing = False,
) -> None:
    """Train a LoRA adapter for chunks that are encoded apart: Block-Attention or TurboRAG.

    A prompt's chunks do not see each other in training, as they do not when their KV is reused; the question sees all.
    Ctrl-C or --hours pauses it, and the same command goes on from the last checkpoint. Exit code 1: nothing was gained.
    """
    settings = _settings(epochs, batch, lr, every, patience, seed)
    options = {"model": model, "method": method, "joint": joint, "rank": rank, "mixed": mixed}
    limits = _limits(stop_documents, report_documents, stop_items, hours)
    _run(_training("command").blocks(data or [], out, settings, options, checkpointing=checkpointing, **limits))


@app.command()
def auxiliary(
    data: Data = None,
    out: Annotated[Path, typer.Option(help="The folder of the adapter, its card and its checkpoint.")] = Path(
        "auxiliary"
    ),
    model: Annotated[str, typer.Option(help="The model that it selects tokens for.")] = "qwen2.5-coder-0.5b-instruct",
    auxiliary: Annotated[str, typer.Option(help="The auxiliary model that is tuned.")] = "smollm2-135m-instruct",
    layers: Annotated[str, typer.Option(help="Its layers that score: last or upper.")] = "last",
    rank: Rank = 8,
    lr: Rate = 2e-4,
    batch: Batch = 8,
    epochs: Epochs = 3,
    every: Every = 20,
    patience: Patience = 4,
    seed: Seed = 0,
    stop_documents: StopDocuments = 3,
    report_documents: ReportDocuments = 6,
    stop_items: StopItems = 32,
    hours: Hours = None,
    mixed: Mixed = None,
    checkpointing: Checkpointing = False,
) -> None:
    """Fit an auxiliary model to the model it selects tokens for: LoRA towards that model's attention from the question.

    Ctrl-C or --hours pauses it, and the same command goes on from the last checkpoint. Exit code 1: nothing was gained.
    """
    settings = _settings(epochs, batch, lr, every, patience, seed)
    options = {"model": model, "auxiliary": auxiliary, "layers": layers, "rank": rank, "mixed": mixed}
    limits = _limits(stop_documents, report_documents, stop_items, hours)
    _run(_training("command").auxiliary(data or [], out, settings, options, checkpointing=checkpointing, **limits))


@app.command()
def head(
    data: Data = None,
    out: Annotated[Path, typer.Option(help="The folder of the head, its card and its checkpoint.")] = Path("head"),
    model: Annotated[str, typer.Option(help="The model that it selects tokens for.")] = "qwen2.5-coder-0.5b-instruct",
    auxiliary: Annotated[str, typer.Option(help="The auxiliary model that it is a head of.")] = "smollm2-135m-instruct",
    hidden: Annotated[int, typer.Option(min=1, help="Its hidden units.")] = 32,
    lr: Rate = 3e-3,
    batch: Batch = 8,
    epochs: Epochs = 20,
    every: Every = 20,
    patience: Patience = 10,
    seed: Seed = 0,
    stop_documents: StopDocuments = 3,
    report_documents: ReportDocuments = 6,
    stop_items: StopItems = 32,
    hours: Hours = None,
) -> None:
    """Fit a small head on a frozen auxiliary model to the model it selects tokens for: minutes instead of hours.

    Ctrl-C or --hours pauses it, and the same command goes on from the last checkpoint. Exit code 1: nothing was gained.
    """
    settings = _settings(epochs, batch, lr, every, patience, seed)
    options = {"model": model, "auxiliary": auxiliary, "hidden": hidden}
    limits = _limits(stop_documents, report_documents, stop_items, hours)
    _run(_training("command").head(data or [], out, settings, options, **limits))


@app.command()
def recipe(
    data: Data = None,
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


def _settings(epochs: int, batch: int, lr: float, every: int, patience: int, seed: int) -> Any:
    return _training("loop").Settings(epochs=epochs, batch=batch, lr=lr, every=every, patience=patience, seed=seed)


def _limits(stop_documents: int, report_documents: int, stop_items: int, hours: float | None) -> dict[str, Any]:
    return {
        "stop_documents": stop_documents,
        "report_documents": report_documents,
        "stop_items": stop_items,
        "hours": hours,
    }


def _run(plan: Any) -> None:
    work = _training("command")
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
