"""The command line, ``cacheclip``.

A new command is a function with ``@app.command()``. It does not catch errors of this package: the group prints them as
one line and exits with code 2.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import CacheClipError, ConfigurationError
from ..weights.catalogue import CATALOGUE
from ..weights.pull import is_pulled, resolve
from . import documents as app_cli
from . import serve as serve_cli
from . import store as store_cli
from . import tune as tune_cli
from .plain import plain


class _Group(TyperGroup):
    """Prints the errors of this package as one line on stderr, for every command."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CacheClipError as error:
            typer.echo(f"cacheclip: {plain(error)}", err=True)
            raise typer.Exit(2) from None


class _Lists(TyperCommand):
    """Lets repeatable options take several values at once: ``--methods naive cacheclip``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeated = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        spread: list[str] = []
        option, values = "", 0
        for word in args:
            if word.startswith("-"):
                name, value, _ = word.partition("=")
                option, values = name if name in repeated else "", len(value)
            elif option and (values := values + 1) > 1:
                spread.append(option)
            spread.append(word)
        return super().parse_args(ctx, spread)


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False)
app.add_typer(store_cli.app, name="store")
app.add_typer(tune_cli.app, name="tune")
app.command()(app_cli.ingest)
app.command()(app_cli.ask)
app.command(cls=serve_cli.Serve, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    serve_cli.serve
)


def _evaluation(module: str) -> Any:
    """A module of `cacheclip_eval`, imported on use: it loads torch, and the library does not depend on it."""
    return importlib.import_module(f"cacheclip_eval.{module}")


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(version("cacheclip-rag"))
        except PackageNotFoundError:  # a checkout that was never installed
            typer.echo("0+unknown")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Reuse the KV cache of document chunks, for a lower time to the first token.

    To begin: `cacheclip ingest FOLDER`, then `cacheclip ask "..."`; `cacheclip bench` measures this machine.
    """


@app.command()
def pull(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Catalogue names, hub ids, folders or .gguf files.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the catalogue.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Fetch model weights and print the folder of each."""
    if list_:
        _print_catalogue()
    elif not names:
        raise typer.BadParameter("give at least one NAME, or --list")
    for name in names or ():
        typer.echo(resolve(name, progress=not quiet))


@app.command()
def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A catalogue name, hub id, folder or .gguf file.")],
    store: Annotated[
        Path | None,
        typer.Option(
            "--store", "-s", help="The store whose files to check; a canary chunk stays in it.", show_default="none"
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that reuse can be trusted with a model on this machine. Exit code 1: it cannot; 2: bad input.

    The verdict is kept for engines that require it: Engine(MODEL, require_verified=True).
    """
    import torch

    from ..model.backbone import Backbone
    from ..model.threads import allowance
    from ..verification import verify as tried
    from ..weights import verified

    found = tried(Backbone.load(resolve(model), dtype=dtype, device=device), store)
    count = torch.get_num_threads()
    threads = f"{count} thread{'' if count == 1 else 's'}; this process may use {allowance()}"
    if found.identity:
        try:
            verified.write(found.identity, found.record)
        except OSError as error:
            raise ConfigurationError(f"the verdict cannot be kept: {error}") from error
    if as_json:
        typer.echo(
            json.dumps({"model": model, **found.record, "identity": found.identity, "threads": threads}, indent=1)
        )
    else:
        typer.echo(f"computing with {threads}")
        for check in found.checks:
            verdict = "ok" if check.passed else "FAILED"
            typer.echo(f"{verdict:6}  {check.name}: {check.found:.2g} (limit {check.limit:.2g})")
        typer.echo(f"{model} {found.line}")
    if not found.trusted:
        raise typer.Exit(1)


@app.command("eval", cls=_Lists)
def evaluate(
    data: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATA...", help="\\[name=]FILE.jsonl, a folder with a qa.jsonl, or ruler:TASK:TOKENS."),
    ] = None,
    model: Annotated[str, typer.Option(help="The model that answers.")] = "qwen2.5-coder-1.5b-instruct",
    auxiliary: Annotated[
        str, typer.Option(help="The auxiliary model, loaded where a method needs one.")
    ] = "smollm2-135m-instruct",
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD...", help="name\\[@ratio]\\[:param=value,...].", show_default="naive query_guided cacheclip"
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Recompute ratio of the methods that are not given one, but for auto.", show_default="each method's"
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PARAM=VALUE,...",
            help="One system per value: ratio=0.05,0.1 group_size=4,8 prefix=none,system.",
            show_default="no sweep",
        ),
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Items of each data set, spread over it.")] = 20,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest answer, in tokens.", show_default="32; 64 for RULER tasks")
    ] = None,
    out: Annotated[Path, typer.Option(help="Rows are appended here; existing ones are not run again.")] = Path(
        "rows.jsonl"
    ),
    references: Annotated[
        Path | None, typer.Option(help="Folder of full prefill's answers.", show_default="references/ beside the rows")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder that keeps chunk KV.", show_default="none, in memory only")
    ] = None,
    kv_dtype: Annotated[
        str, typer.Option(help="The dtype of stored KV: auto, the model's, or int8; then labels end in +int8.")
    ] = "auto",
    baseline: Annotated[
        str | None, typer.Option(help="Also print each system's difference from this one.", show_default="none")
    ] = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="Answer, or only print existing rows.")] = True,
    table: Annotated[bool, typer.Option("--table/--no-table", help="Print tables at the end.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Compare methods with full prefill. Exit code 1: some answers failed; 2: bad input."""
    command = _evaluation("command")

    code = 0
    if run:
        plan = command.plan(
            data or [],
            methods or ["naive", "query_guided", "cacheclip"],
            ratio=ratio,
            sweeps=sweep or [],
            model=model,
            auxiliary=auxiliary,
            out=out,
            items=items,
            length=max_new_tokens,
            references=references,
            store=store,
            kv_dtype=kv_dtype,
            baseline=baseline,
        )
        code = command.execute(plan)
    if table and code != command.INTERRUPTED:
        typer.echo(command.render(out, baseline, as_json), nl=as_json)
    if code:
        raise typer.Exit(code)


@app.command()
def analyse(
    question: Annotated[
        str, typer.Argument(help="agreement, deviation or hits (run a model); pareto, sweep or length (draw rows).")
    ],
    data: Annotated[list[str] | None, typer.Argument(metavar="DATA...", help="As for eval.")] = None,
    rows: Annotated[
        Path | None,
        typer.Option(help="Rows of eval, for pareto, sweep and length, which need them.", show_default="none"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The figure, .svg or .png.", show_default="QUESTION.svg")] = None,
    model: Annotated[str, typer.Option(help="The model that answers.")] = "qwen2.5-coder-1.5b-instruct",
    auxiliary: Annotated[
        list[str] | None, typer.Option(help="For agreement: auxiliary models.", show_default="smollm2-135m-instruct")
    ] = None,
    method: Annotated[str, typer.Option(help="For deviation: how chunks are encoded.")] = "naive",
    by: Annotated[
        str,
        typer.Option(
            help="For sweep: the parameter; for length: prompt_tokens or chunks.", show_default="ratio; prompt_tokens"
        ),
    ] = "",
    measure: Annotated[str, typer.Option(help="kl, score, adjusted, agree.")] = "kl",
    items: Annotated[int, typer.Option(min=1, help="Items of each data set.")] = 10,
) -> None:
    """Draw a figure that answers one question, and write its numbers beside it as JSONL."""
    work = _evaluation("analyse")

    figure = out or Path(f"{question}.svg")
    helpers = auxiliary or ["smollm2-135m-instruct"]
    for line in work.answer(question, data or [], rows, figure, model, helpers, method, by, measure, items):
        typer.echo(line)


@app.command()
def fuse(
    model: Annotated[str, typer.Option(help="The model whose KV it is.")],
    store: store_cli.Folder = store_cli.DEFAULT,
    similar: Annotated[
        bool, typer.Option("--similar", help="Fuse each chunk with similar ones (MiniLM embeddings).")
    ] = False,
    least: Annotated[
        int, typer.Option(min=1, help="Without --similar: fuse chunks of so many prompts or more, as used together.")
    ] = 2,
    count: Annotated[int, typer.Option(min=1, help="The number of chunks to fuse each one with.")] = 10,
    method: Annotated[str, typer.Option(help="The method that will use the variants; it says how to encode.")] = "auto",
    tenant: Annotated[str, typer.Option(help="The engine's tenant.", show_default="none")] = "",
    secret_file: store_cli.Secret = None,
    remote: Annotated[str, typer.Option(metavar="URL", help="The engine's remote store.", show_default="none")] = "",
    kv_dtype: Annotated[str, typer.Option(help="The engine's kv_dtype: auto or int8.")] = "auto",
    dtype: Annotated[str, typer.Option(help="The engine's dtype: auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    cap: Annotated[
        str | None,
        typer.Option(
            help="The engine's disk_bytes, such as 64GiB.",
            show_default="32GiB, or twice the store's size if that is more",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compute fused variants of stored chunks: each chunk again, behind chunks it is likely to follow in a prompt.

    Existing variants are not computed again, so it can be stopped and repeated. Methods that take fused variants (auto,
    fusionrag, and any with fused=True) then recompute less for the same quality. The engine must have the same method,
    tenant, secret, dtype and so on, which are part of the namespace of stored KV.
    """
    from ..corpus.neighbours import similar as nearest
    from ..engine import Engine  # torch is slow to import
    from .documents import quietly
    from .progress import bar

    with quietly(), bar() as progress:
        progress("opening the model", 0, 0)
        with Engine(
            model,
            method=method,
            store=store,
            disk_bytes=store_cli.room(store, cap),
            tenant=tenant,
            secret=store_cli.secret_of(secret_file, store),
            remote=remote or None,
            kv_dtype=cast(Any, kv_dtype),  # Engine checks it
            dtype=dtype,
            device=device,
        ) as engine:
            if not engine.method.ahead:
                raise ConfigurationError(
                    f"{method} encodes no chunk ahead, so that none can be fused: try --method auto"
                )
            texts = engine.index.texts()
            if not texts:
                raise ConfigurationError(
                    f"{store} holds no chunks that {model} encoded for {method}: run `cacheclip ingest FOLDER "
                    f"--model {model}` first, or say where with --store; `cacheclip store stats` says what is there"
                )
            if similar:
                mean_pooling = _evaluation("embedding").mean_pooling

                progress("embedding", 0, 0)
                neighbours = nearest(texts, mean_pooling(), count)
            else:
                neighbours = engine.contexts(least, count)
            result = engine.fuse(neighbours, lambda done: progress("fusing chunks", done, len(neighbours)))
    if not neighbours and not as_json:
        typer.echo(f"no chunk came in {least} prompts yet, so nothing was fused; --similar needs no prompts")
        return
    if as_json:
        typer.echo(json.dumps({"chunks": len(result.keys), "fused": result.encoded, "skipped": len(result.skipped)}))
    else:
        typer.echo(f"{result.encoded:,} of {len(result.keys):,} chunks fused now, {len(result.skipped):,} left out")
        for text, reason in result.skipped[:10]:
            typer.echo(f"  {text!r}: {reason}")


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="The model that answers.")] = "smollm2-135m-instruct",
    auxiliary: Annotated[str | None, typer.Option(help="An auxiliary model.", show_default="none")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="How tokens to recompute are chosen.", show_default="cacheclip with an auxiliary model, else auto"
        ),
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Recompute ratio.", show_default="the method's")] = None,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks in a prompt.")] = 8,
    tokens: Annotated[int, typer.Option(min=32, help="Tokens of a chunk, about.")] = 200,
    pairs: Annotated[int, typer.Option(min=1, help="Prompts that are measured.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure time to first token on this machine: full prefill against reuse of the same chunks, with the quality.

    About a minute on a CPU with the default model and prompts of 1,700 tokens. Each prompt is new; its chunks were
    encoded before.
    KL is the distance of the first token's distribution from full prefill's, for this method and for plain reuse.
    The prose is generated, so this says nothing about the quality of answers: `cacheclip eval` does.
    """
    work = _evaluation("bench")

    from ..engine import Engine  # torch is slow to import
    from .documents import quietly
    from .progress import bar

    with quietly():
        with bar() as progress:
            progress("opening the model", 0, 0)
            with Engine(model, auxiliary=auxiliary, method=method) as engine:
                result = work.run(engine, chunks=chunks, tokens=tokens, pairs=pairs, ratio=ratio, progress=progress)
        if as_json:
            typer.echo(json.dumps(asdict(result) | {"model": model, "machine": work.machine()}))
        else:
            typer.echo("\n".join(work.lines(result)))


def _print_catalogue() -> None:
    for model in CATALOGUE.values():
        here = "  [pulled]" if is_pulled(model.name) else ""
        sizes = f"download {model.download_bytes / 1e6:,.0f} MB, on disk {model.disk_bytes / 1e6:,.0f} MB"
        typer.echo(f"{model.name:28} {sizes}, {model.licence}{here}")
        typer.echo(f"{'':28} {model.about}; on the hub: {model.hub_id}")


if __name__ == "__main__":
    app()
