"""The commands ``cacheclip tune ...``; the work is done by `cacheclip_train`, which is imported when one runs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigurationError
from .documents import quietly
from .progress import bar

app = typer.Typer(no_args_is_help=True, help="Train what methods of the literature train. Resumable.")


@app.command()
def blocks(
    data: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATA...", help="\\[name=]FILE.jsonl or a folder with a qa.jsonl, as for eval."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of the adapter, its card and its checkpoint.")] = Path("blocks"),
    model: Annotated[str, typer.Option(help="The model that is tuned.")] = "smollm2-135m-instruct",
    method: Annotated[
        str, typer.Option(help="blockattention, turborag or turborag:positions=shared.")
    ] = "blockattention",
    joint: Annotated[
        bool | None,
        typer.Option("--joint/--no-joint", help="Train full attention, too.", show_default="for blockattention"),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="LoRA's rank.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-4,
    batch: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = 8,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data, at most.")] = 3,
    every: Annotated[int, typer.Option(min=1, help="Steps between two looks at held-out questions.")] = 20,
    patience: Annotated[int, typer.Option(min=1, help="Looks without a gain that end it.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the split, the order and the first weights.")] = 0,
    stop_documents: Annotated[int, typer.Option(min=1, help="Documents of each set to stop by.")] = 3,
    report_documents: Annotated[int, typer.Option(min=0, help="Documents of each set to report on.")] = 6,
    stop_items: Annotated[int, typer.Option(min=1, help="Questions to stop by, spread over them.")] = 32,
    hours: Annotated[float | None, typer.Option(min=0.0, help="Pause after so many.", show_default="no limit")] = None,
    mixed: Annotated[
        bool | None,
        typer.Option("--mixed/--no-mixed", help="Multiply in bfloat16.", show_default="where the hardware does"),
    ] = None,
) -> None:
    """Train a LoRA adapter for chunks that are encoded apart: Block-Attention or TurboRAG.

    A prompt's chunks do not see each other in training, as they do not when their KV is reused; the question sees all.
    Ctrl-C or --hours pauses it, and the same command goes on from the last checkpoint. Exit code 1: nothing was gained.
    """
    work = _training("command")
    settings = _training("loop").Settings(epochs=epochs, batch=batch, lr=lr, every=every, patience=patience, seed=seed)
    plan = work.plan(
        data or [],
        method,
        model=model,
        out=out,
        settings=settings,
        joint=joint,
        rank=rank,
        stop_documents=stop_documents,
        report_documents=report_documents,
        stop_items=stop_items,
        hours=hours,
        mixed=mixed,
    )
    with quietly(), bar() as progress:
        outcome = work.execute(plan, progress)
    for line in work.lines(plan, outcome):
        typer.echo(line)
    if outcome.ended != "paused" and not outcome.gained:
        raise typer.Exit(1)


def _training(module: str) -> Any:
    try:
        return importlib.import_module(f"cacheclip_train.{module}")
    except ImportError as error:
        raise ConfigurationError(f"{error}; tune needs peft: pip install 'cacheclip-rag[train]'") from error
