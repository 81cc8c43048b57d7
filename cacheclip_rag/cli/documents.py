"""The commands ``cacheclip ingest`` and ``cacheclip ask``: what is written on the command line and what is printed.

The work is done by `cacheclip_app`, which needs LlamaIndex; it is looked up by name when a command runs, so that the
core imports no framework.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..errors import ConfigurationError
from .plain import plain
from .progress import bar, say, timed
from .store import nbytes

INTERRUPTED = 130
"""Exit code of Ctrl-C, as shells count it."""

Home = Annotated[Path, typer.Option("--home", envvar="CACHECLIP_STORE", help="Where vectors and chunk KV are kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on stdout.")]


def ingest(
    folder: Annotated[Path, typer.Argument(help="PDF, Markdown, HTML and text files, subfolders included.")],
    home: Home = Path(".cacheclip"),
    model: Annotated[
        str | None,
        typer.Option(
            help="The model that will answer: `cacheclip pull --list`, a hub id or a folder.",
            show_default="last time's, else qwen2.5-coder-0.5b-instruct",
        ),
    ] = None,
    auxiliary: Annotated[
        str | None,
        typer.Option(
            help='A small model that selects tokens; "none": the question\'s own attention does.',
            show_default="last time's, else none",
        ),
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(min=64, help="Tokens of a chunk, about.", show_default="last time's, else 320")
    ] = None,
    cap: Annotated[
        str | None,
        typer.Option(
            help="The most that all KV may take on the disk, as in 8GiB.", show_default="last time's, else 32GiB"
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say how much it is and how long it takes on this machine, and keep nothing."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read a folder of documents once, so that answers from it start sooner.

    Every file is cut into chunks, every chunk embedded and read by the model, and its KV cache kept. Run it again
    after files changed: only what is new is read, and what is gone is forgotten. Ctrl-C loses nothing that was
    finished. Links that lead out of FOLDER are not followed. Exit code 1: some files could not be read, or the store
    has no room for all chunks; 2: bad input.

    Then: cacheclip ask "What do the documents say about ...?"
    """
    with quietly(), bar() as progress:
        app = _app("folder")  # slow to import
        limit = None if cap is None else nbytes(cap)
        library = app.Library.given(home, model=model, auxiliary=auxiliary, chunk_size=chunk_size, disk_bytes=limit)
        if dry_run:
            plan = app.plan(folder, library, progress)
        else:
            result = app.ingest(folder, library, _embedding(), progress, lambda said: say(plain(said)))
    if dry_run:
        return _show_plan(plan, as_json)
    if as_json:
        typer.echo(json.dumps(asdict(result)))
    else:
        typer.echo(
            f"{result.files} files, {result.chunks} chunks: {result.encoded} read now, {result.kept} kept, "
            f"{result.removed} forgotten, in {result.seconds:.1f} s; KV of {result.disk_bytes / 1e9:.2f} GB in "
            f"{plain(home)}"
        )
    for name in result.unread:
        say(f"nothing could be read from {plain(name)}: is it empty, damaged, locked or a scan?")
    _name_passed_over(result.passed_over)
    for text, reason in result.skipped:
        say(f"no KV of {text!r}: {plain(reason)}")
    if result.no_room:
        say(
            f"{result.no_room:,} of {result.chunks:,} chunks have no KV: the store is full at "
            f"{result.cap_bytes / (1 << 30):.2f} GiB. Prompts with them are prefilled as usual; --cap gives it more "
            "room, and --dry-run says how much is wanted"
        )
    if result.unread or result.no_room:
        raise typer.Exit(1)


def _show_plan(plan: Any, as_json: bool) -> None:
    """Exit code 1 where the cap does not hold all of it."""
    if as_json:
        typer.echo(json.dumps(asdict(plan)))
    else:
        typer.echo(
            f"{plan.files} files, {plan.chunks:,} chunks of {plan.tokens:,} tokens, {plan.new:,} of them new: "
            f"KV of {plan.nbytes / (1 << 30):.2f} GiB in all, about {plan.minutes:.1f} minutes to read what is new"
        )
        if plan.fitting >= plan.chunks:
            typer.echo(f"the cap of {plan.cap_bytes / (1 << 30):.2f} GiB holds all of it")
    _name_passed_over(plan.passed_over)
    if plan.fitting < plan.chunks:
        say(
            f"the cap of {plan.cap_bytes / (1 << 30):.2f} GiB holds {plan.fitting:,} of {plan.chunks:,} chunks: "
            "raise it with --cap, or take a smaller model or folder"
        )
        raise typer.Exit(1)


def _name_passed_over(names: list[str]) -> None:
    for name in names:
        say(f"passed over {plain(name)}: a link that leads out of the folder, or a name that is no text")


def ask(
    question: Annotated[str | None, typer.Argument(help="Without one, questions are read from the terminal.")] = None,
    home: Home = Path(".cacheclip"),
    top_k: Annotated[int, typer.Option(min=1, help="How many chunks are retrieved.")] = 6,
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of chunk tokens to recompute: 0 plain reuse, 1 full prefill.", show_default="the method's"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 128,
    method: Annotated[
        str | None,
        typer.Option(
            help="How tokens to recompute are chosen.", show_default="cacheclip if ingest had --auxiliary, else auto"
        ),
    ] = None,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Show what happened to the prompt.")] = True,
    compare: Annotated[bool, typer.Option("--compare", help="Also answer from a full prefill, and time it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask about the documents that `cacheclip ingest` has read.

    The answer appears as it is written, then where it is from and what happened to the prompt's tokens. Without a
    question it goes on asking until an empty line or Ctrl-D.
    """
    if as_json and question is None:
        raise ConfigurationError("--json answers one question: cacheclip ask --json QUESTION")
    console = Console(highlight=False, soft_wrap=True)
    with quietly():
        with bar("ready") as progress:
            library = _app("folder").Library.read(home)
            progress("opening the model", 0, 0)
            session = _app("session").Session(
                library, _embedding().load(), top_k=top_k, ratio=ratio, tokens=tokens, method=method
            )
        try:
            for asked in [question] if question is not None else _questions(console):
                with timed("answered"):
                    reply = session.ask(asked, _silent if as_json else _show, compare)
                if as_json:
                    shown = {"answer": reply.text, "sources": reply.sources, "report": reply.report.as_dict()}
                    full = {} if reply.full_prefill is None else {"full_prefill": reply.full_prefill}
                    typer.echo(json.dumps(shown | full))
                    continue
                console.print()
                console.print(Text(f"from {plain(', '.join(reply.sources))}", style="dim"))
                if reply.full_prefill is not None:
                    _show(f"\nfull prefill answers: {reply.full_prefill}\n")
                if report:
                    console.print(reply.report, soft_wrap=False)
        finally:
            session.close()


def _questions(console: Console) -> Iterator[str]:
    while True:
        try:
            asked = console.input("[bold]ask> [/bold]" if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not asked:
            return
        yield asked


def _show(piece: str) -> None:
    """Answers may repeat what documents say, so they do not get to steer the terminal either."""
    sys.stdout.write("".join(c for c in piece if c.isprintable() or c in "\n\t"))
    sys.stdout.flush()


def _silent(_: str) -> None:
    pass


def _app(room: str) -> Any:
    try:
        return importlib.import_module(f"cacheclip_app.{room}")
    except ImportError as error:
        raise ConfigurationError(
            f"{error}; ingest and ask need LlamaIndex: pip install 'cacheclip-rag[app]'"
        ) from error


def _embedding() -> Any:
    return _app("embedding").MiniLM()


@contextmanager
def quietly() -> Iterator[None]:
    """Other libraries' bars and warnings would break into ours; Ctrl-C is an exit code, not a traceback."""
    import logging

    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(err=True)
        say("stopped; what was finished is kept")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        logging.disable(logging.NOTSET)
