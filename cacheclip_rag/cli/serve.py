"""The command ``cacheclip serve``: vLLM's own server with chunk reuse, or the embedded engine behind the same API."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperCommand

from ..errors import ConfigurationError
from . import store as store_cli
from .documents import quietly
from .progress import bar

_ARGUMENTS = "cacheclip.arguments"
_LOCAL = ("127.0.0.1", "localhost", "::1")


class Serve(TyperCommand):
    """Keeps what was written on the command line, for vLLM, and lets options through that are none of ours."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)


def serve(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="The model that answers, in front of all options: a catalogue name, hub id or folder.")
    ],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for all addresses.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY[=TENANT]", help="Who may ask, and whose chunks that are.", show_default="none"),
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same, one a line.", show_default="none")
    ] = None,
    store: store_cli.Folder = store_cli.DEFAULT,
    method: Annotated[
        str | None,
        typer.Option(
            help="How tokens to recompute are chosen.", show_default="cacheclip with an auxiliary model, else auto"
        ),
    ] = None,
    auxiliary: Annotated[
        str | None, typer.Option(help="A small model that selects tokens.", show_default="none")
    ] = None,
    secret_file: store_cli.Secret = None,
    remote: Annotated[
        str, typer.Option(metavar="URL", help="A remote store, as in s3://bucket/kv.", show_default="none")
    ] = "",
    kv_dtype: Annotated[str, typer.Option(help="The dtype of stored KV: auto or int8.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    cap: Annotated[
        str | None,
        typer.Option(help="The most that KV may take on the disk.", show_default="32GiB, or twice what is there"),
    ] = None,
    fuse_when_idle: Annotated[
        bool, typer.Option("--fuse-when-idle", help="While nothing is asked, fuse chunks that prompts held together.")
    ] = False,
    audit: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The share of prompts that is checked against full prefill.")
    ] = 0.0,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="This library's own engine, also where vLLM is installed.")
    ] = False,
) -> None:
    """Answer over HTTP as OpenAI's API does, from documents that clients put there.

    Where vLLM and vllm-cacheclip are installed, vLLM serves, and takes its own options here. Elsewhere, and with
    --embedded, this library's engine does: pip install 'cacheclip-rag\\[serve]'.

    Then: curl -X PUT localhost:8000/v1/documents/ID -H 'Content-Type: application/json' -d '{"texts": ["..."]}'
    """
    if not embedded and find_spec("vllm") is not None and find_spec("cacheclip_vllm") is not None:
        if audit:
            raise ConfigurationError("--audit is not there inside vLLM yet: --embedded has it")
        options: dict[str, Any] = {
            "store": str(store.expanduser().absolute()),
            "kv_dtype": kv_dtype,
            "disk_bytes": store_cli.room(store, cap),
        }
        if fuse_when_idle:
            options["fuse_when_idle"] = True
        options |= {name: value for name, value in (("method", method), ("remote", remote)) if value}
        if auxiliary is not None:
            from ..weights.pull import resolve

            options["auxiliary"] = str(resolve(auxiliary).absolute())
        from ..server.access import read_keys

        owners = read_keys(api_key or (), api_keys)
        lines = [f"{key}={tenant}" if tenant else key for key, tenant in owners.items()]
        flags = _others(ctx.meta[_ARGUMENTS], model)
        if not any(flag.partition("=")[0] == "--host" for flag in flags):  # vLLM's own default is all addresses
            flags += ["--host", host]
        _warn(lines, host, port)
        serve_vllm(model, flags, options, lines, store_cli.secret_of(secret_file, store))
    if ctx.args:
        raise ConfigurationError(f"no such option: {' '.join(ctx.args)} (vLLM's need vllm-cacheclip installed)")
    try:
        from ..server.access import read_keys
        from ..server.app import run
        from ..server.embedded import Engines
    except ImportError as error:
        raise ConfigurationError(f"{error}; serve needs FastAPI: pip install 'cacheclip-rag[serve]'") from error
    from ..engine import GIB, Engine
    from ..weights.opened import open_backbone

    keys = read_keys(api_key or (), api_keys)
    _warn(keys, host, port)
    tenants = sorted({*keys.values()} or {""})
    with quietly(), bar() as progress:
        progress("opening the model", 0, 0)
        main, *helper = (open_backbone(name, dtype, device) for name in (model, auxiliary) if name is not None)

        def opened(tenant: str) -> Engine:
            return Engine(
                main,
                auxiliary=helper[0] if helper else None,
                method=method,
                store=store,
                memory_bytes=4 * GIB // len(tenants),
                disk_bytes=store_cli.room(store, cap),
                tenant=tenant,
                secret=store_cli.secret_of(secret_file, store),
                remote=remote or None,
                fuse_when_idle=fuse_when_idle,
                audit=audit,
                kv_dtype=cast(Any, kv_dtype),  # Engine checks it
            )

        engines = Engines(opened, method or ("cacheclip" if helper else "auto"))
        for tenant in tenants:  # what is wrong with the store is said now
            engines.of(tenant)
    run(engines, model, keys, host, port)


def _warn(keys: Collection[str], host: str, port: int) -> None:
    if not keys and host not in _LOCAL:
        typer.echo(f"cacheclip: whoever reaches {host}:{port} may ask, store and forget: see --api-key", err=True)


_OWN = (
    "--api-key",
    "--api-keys",
    "--store",
    "--method",
    "--auxiliary",
    "--secret-file",
    "--remote",
    "--kv-dtype",
    "--cap",
    "--audit",
)
"""Options of ours with a value. All others are vLLM's."""
_SWITCHES = ("--fuse-when-idle", "--embedded")
"""Options of ours without a value."""


def _others(arguments: Sequence[str], model: str) -> list[str]:
    """What was written on the command line for vLLM, as it was written."""
    left, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip or name in _OWN:
            skip = not skip and not equals
        elif name not in _SWITCHES:
            left.append(argument)
    left.remove(model)
    return left


def serve_vllm(
    model: str, flags: Sequence[str], options: dict[str, Any], keys: Sequence[str], secret: bytes
) -> NoReturn:
    """Become vLLM's own OpenAI server, with this library in its worker, its endpoints and in front of it.

    ``flags``: vLLM's, as they were written; ``options``: those of the connector. Keys and the secret travel in the
    environment, which other users of the machine cannot read as they can a command line.
    """
    from ..weights.catalogue import CATALOGUE
    from ..weights.pull import resolve

    named = ["--model", str(resolve(model)), "--served-model-name", model] if model in CATALOGUE else ["--model", model]
    config = {
        "kv_connector": "CacheClipConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": options,
    }
    environment = os.environ | {
        "VLLM_PLUGINS": "cacheclip,cacheclip_chunks",
        "CACHECLIP_API_KEYS": "\n".join(keys),
        "CACHECLIP_METHOD": options.get("method", "cacheclip" if "auxiliary" in options else "auto"),
        "CACHECLIP_AUXILIARY": options.get("auxiliary", ""),
        "CACHECLIP_SECRET": secret.hex(),
    }
    ours = ["--worker-cls", "cacheclip_vllm.worker.Worker", "--kv-transfer-config", json.dumps(config)]
    ours += ["--middleware", "cacheclip_vllm.http.ServerAccess"]
    # Not the command "vllm": that of the CPU build does not find its own version.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *named, *ours, *flags]
    os.execve(sys.executable, server, environment)
