"""The commands ``cacheclip store ...``, which inspect and clean up a folder of chunk KV. None loads a model."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigurationError
from .plain import plain

if TYPE_CHECKING:
    from ..store.admin import Administration
    from ..store.holdings import Holdings
    from ..store.remote_admin import RemoteAdministration

app = typer.Typer(no_args_is_help=True, help="Look after a folder of chunk KV.")

Folder = Annotated[Path, typer.Option("--store", "-s", envvar="CACHECLIP_STORE", help="The store's folder.")]
Remotely = Annotated[
    str,
    typer.Option(
        "--remote",
        metavar="URL",
        help="A remote instead of a folder (an fsspec url, s3://bucket/kv).",
        show_default="none",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OfNamespace = Annotated[
    str, typer.Option("--namespace", "-n", help="Only namespaces whose names begin so.", show_default="all")
]
Tenant = Annotated[str, typer.Option(help="Whose document that is.", show_default="the one without a name")]
Secret = Annotated[Path | None, typer.Option(help="A file with the secret of keyed chunks.", show_default="none")]
DEFAULT = Path(".cacheclip")
DISK_BYTES = 32 << 30
"""An engine's default; importing it would import torch."""


@app.command()
def stats(
    store: Folder = DEFAULT,
    remote: Remotely = "",
    document: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Only of the chunks that were stored as this document's.", show_default="all"),
    ] = None,
    tenant: Tenant = "",
    secret_file: Secret = None,
    as_json: AsJson = False,
) -> None:
    """What each model, encoder and tenant takes up; with --document, what the documents with these IDs do."""
    if document and remote:
        raise typer.BadParameter("which chunks a document has is known in a folder: --document goes without --remote")
    if document:
        folder = _folder(store)
        found = folder.usage_of_documents(document, tenant, secret(secret_file, folder))
    else:
        found = _open(store, remote).usage()
    if as_json:
        return _print([asdict(one) for one in found])
    for one in found:
        about = one.about
        keyed = ", keyed" if about.get("keyed") else ""
        tenant = f", tenant {plain(about['tenant'])}" if about.get("tenant") else ""
        typer.echo(
            f"{one.name[:12]}  {_size(one.nbytes):>9}  {one.entries:>7,} chunks  {one.tokens:>10,} tokens  "
            f"{one.bytes_per_token / 1024:,.1f} KB a token  used {_ago(one.used)}"
        )
        typer.echo(
            f"{'':12}  {plain(about.get('architecture', 'unknown model'))} {plain(about.get('dtype', ''))} "
            f"{plain(about.get('weights', ''))[:8]}, {plain(about.get('encoder', 'unknown encoder'))}{tenant}{keyed}"
        )
        if one.unreadable or one.garbage:
            left = f"{one.garbage} damaged or unfinished files ({_size(one.garbage_bytes)})"
            typer.echo(f"{'':12}  {left}, {one.unreadable} without a readable header")
    total = sum(one.nbytes + one.garbage_bytes for one in found)
    typer.echo(f"{_size(total)} in {sum(one.entries for one in found):,} chunks")


@app.command("list")
def list_(
    store: Folder = DEFAULT,
    remote: Remotely = "",
    namespace: OfNamespace = "",
    text: Annotated[bool, typer.Option("--text", help="With the whole text of each chunk.")] = False,
    as_json: AsJson = False,
) -> None:
    """All chunks, those used last first."""
    found = sorted(_open(store, remote).entries(namespace), key=lambda stored: -stored.used)
    if as_json:
        return _print(
            [{k: v for k, v in asdict(stored).items() if text or k not in ("text", "context")} for stored in found]
        )
    for stored in found:
        shown = stored.text if text else stored.text[:60]
        typer.echo(
            f"{stored.namespace[:12]}  {plain(stored.key[:12])}  {_size(stored.nbytes):>9}  "
            f"{stored.tokens:>6,} tokens  used {_ago(stored.used)}  {plain(shown)}"
        )


@app.command()
def verify(
    store: Folder = DEFAULT,
    remote: Remotely = "",
    secret_file: Secret = None,
    as_json: AsJson = False,
) -> None:
    """Read every file and check it as a request would; exits with 1 when one is damaged. Changes nothing."""
    place = _open(store, remote)
    result = place.verify(secret(secret_file, place))
    if as_json:
        _print(asdict(result))
    else:
        for name, reason in result.bad:
            typer.echo(f"{plain(name)}: {plain(reason)}")
        for name in result.open_to_others:
            typer.echo(f"{plain(name)}: open to other users")
        unproved = f", {result.unproved:,} keyed ones not checked for want of their secret" if result.unproved else ""
        typer.echo(f"{result.good:,} chunks ({_size(result.nbytes)}) are whole, {len(result.bad):,} are not{unproved}")
    if result.bad:
        raise typer.Exit(1)


@app.command()
def gc(
    store: Folder = DEFAULT,
    cap: Annotated[
        str | None, typer.Option(help="Also evict down to this size, as in 8GiB.", show_default="no cap")
    ] = None,
    unused_days: Annotated[
        float | None, typer.Option(min=0.0, help="Also evict what was not used so long.", show_default="no limit")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Remove damaged files and what crashes left; with options, chunks that are not worth their room."""
    limit = None if cap is None else nbytes(cap)
    gone = _folder(store).collect(limit, None if unused_days is None else unused_days * 86_400)
    chunks = sum(not file.garbage for file in gone)
    freed = sum(file.nbytes for file in gone)
    if as_json:
        return _print({"chunks": chunks, "garbage": len(gone) - chunks, "nbytes": freed})
    typer.echo(f"removed {chunks:,} chunks and {len(gone) - chunks:,} other files, {_size(freed)}")


@app.command()
def forget(
    documents: Annotated[list[Path] | None, typer.Argument(metavar="[DOCUMENT]...", help="Text files.")] = None,
    store: Folder = DEFAULT,
    remote: Remotely = "",
    containing: Annotated[
        list[str] | None, typer.Option(help="Forget chunks with this in their text.", show_default="none")
    ] = None,
    document: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Forget the chunks that were stored as this document's.", show_default="none"),
    ] = None,
    tenant: Tenant = "",
    secret_file: Secret = None,
    namespace: OfNamespace = "",
    as_json: AsJson = False,
) -> None:
    """Remove the KV of every chunk whose text stands in a DOCUMENT or contains a phrase, or that only the documents
    with these IDs have, for all models. With --document and --remote, in the folder, which knows them, and at the
    remote.
    """
    from ..store.holdings import occurs_in

    if not documents and not containing and not document:
        raise typer.BadParameter("give a DOCUMENT, --document ID, or --containing PHRASE")
    if document and (documents or containing or namespace):
        raise typer.BadParameter("--document ID stands alone: it is one tenant's, in all namespaces")
    if any(not phrase.strip() for phrase in containing or ()):
        raise typer.BadParameter("an empty phrase is in every chunk; to remove all: cacheclip store clear")
    try:
        in_documents = occurs_in(path.read_text("utf-8") for path in documents or ())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"a document cannot be read: {error}") from error

    def unwanted(text: str) -> bool:
        return in_documents(text) or any(phrase in text for phrase in containing or ())

    if document:
        folder, elsewhere = _folder(store), [_remote(remote)] if remote else []
        known = secret(secret_file, folder, *elsewhere, used=lambda one: folder.knows_documents(document, tenant, one))
        if not folder.knows_documents(document, tenant, known):
            typer.echo("cacheclip: nothing is known of such a document of this tenant and secret", err=True)
        gone, left = folder.forget_documents(document, tenant, known, elsewhere)
    else:
        place = _open(store, remote)
        gone = place.forget(unwanted, namespace)
        left = sum(stored.holds(unwanted) for stored in place.entries(namespace))
    if as_json:
        _print({"removed": len(gone), "nbytes": sum(stored.nbytes for stored in gone), "left": left})
    else:
        typer.echo(f"removed {len(gone):,} chunks, {_size(sum(s.nbytes for s in gone))}; {left} are left")
    if left:
        raise typer.Exit(1)


@app.command()
def clear(
    store: Folder = DEFAULT,
    remote: Remotely = "",
    namespace: OfNamespace = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove all chunks."""
    place = _open(store, remote)
    if not yes:
        of = f" of namespaces {namespace}..." if namespace else ""
        typer.confirm(f"Remove all chunk KV{of} in {remote or store}?", abort=True)
    count = place.clear(namespace)
    if as_json:
        return _print({"removed": count})
    typer.echo(f"removed {count:,} chunks")


def _open(folder: Path, remote: str) -> Administration | RemoteAdministration:
    return _remote(remote) if remote else _folder(folder)


def _folder(path: Path) -> Administration:
    from ..store.admin import Administration

    return Administration(path)


def _remote(url: str) -> RemoteAdministration:
    from ..store.remote import Remote
    from ..store.remote_admin import RemoteAdministration

    return RemoteAdministration(Remote(url))


def _print(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


def room(folder: Path, cap: str | None) -> int:
    """The cap in bytes of an engine that works on the folder of another one, whose cap it does not know.

    Twice what is there, if that is more than an engine's default: it may add as much, and evicts nothing.
    """
    if cap is not None:
        return nbytes(cap)
    there = sum(found.nbytes for found in _folder(folder).usage()) if folder.is_dir() else 0
    return max(DISK_BYTES, 2 * there)


def secret(path: Path | None, *places: Holdings, used: Callable[[bytes], bool] = lambda _: False) -> bytes:
    """What the file holds; none without a file. Raises `ConfigurationError`.

    An editor ends a file with a line break, and a secret may end with one, too, or with a blank: which is meant is told
    by the keyed chunks in these places, or by what it is ``used`` for. One that fits none of them is an error, since
    nothing would be found with it.
    """
    if path is None:
        return b""
    from ..store.holdings import keyed_by

    try:
        whole = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"the secret cannot be read: {error}") from error
    meant = list(dict.fromkeys((whole.strip(), whole.removesuffix(b"\n").removesuffix(b"\r"), whole)))
    known = set[str]().union(*(place.keyed() for place in places))
    for one in meant:
        if one and (keyed_by(one) in known or used(one)):
            return one
    if known:
        raise ConfigurationError(f"the secret in {path} is not that of any of the keyed chunks here")
    return meant[0]


def secret_of(path: Path | None, store: Path) -> bytes:
    """As `secret`, of the chunks in a folder, if there is one."""
    return secret(path, *([_folder(store)] if path is not None and store.is_dir() else []))


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:,.0f} {unit}" if unit == "B" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.1f} TiB"


def nbytes(text: str) -> int:
    """``"8GiB"``, ``"500 MB"``, ``"1000"``. Raises `ConfigurationError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigurationError(f'"{text}" is no size: write 500MB or 8GiB')
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))


def _ago(moment: float) -> str:
    minutes = (time.time() - moment) / 60
    if moment <= 0:
        return "never"
    if minutes < 120:
        return f"{max(minutes, 0):.0f} min ago"
    return f"{minutes / 60:.0f} h ago" if minutes < 2880 else f"{minutes / 1440:.0f} days ago"
