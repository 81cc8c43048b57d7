"""The command ``cacheclip``.

A new command is a function with ``@app.command()``. It lets errors of this package out: the group prints them as one
line and exits with code 2.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .catalogue import CATALOGUE
from .errors import CacheClipError
from .pull import is_pulled, resolve


class _Group(TyperGroup):
    """Turns the errors that this package raises on purpose into one line on stderr, for every command."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CacheClipError as error:
            typer.echo(f"cacheclip: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False)


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
    """Reuse the KV cache of document chunks, so that answers start sooner."""


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


def _print_catalogue() -> None:
    for model in CATALOGUE.values():
        here = "  [pulled]" if is_pulled(model.name) else ""
        sizes = f"download {model.download_bytes / 1e6:,.0f} MB, on disk {model.disk_bytes / 1e6:,.0f} MB"
        typer.echo(f"{model.name:28} {sizes}, {model.licence}{here}")
        typer.echo(f"{'':28} {model.about}; on the hub: {model.hub_id}")


if __name__ == "__main__":
    app()
