"""Install torch into this environment: a CPU build unless there is an NVIDIA GPU.

    python tools/scripts/setup_torch.py

Where pip would download a CUDA build for a machine without a GPU (several GB), `uv` downloads the CPU build, since it
knows PyTorch's package indexes. Does nothing if torch is installed.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PINNED = "torch==2.13.0"  # the version that the tests ran with; a later one may be installed beforehand
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


def drags_cuda() -> bool:
    """Whether pip would install CUDA libraries along with torch here."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [*PIP, "install", "--dry-run", "--ignore-installed", "--report", str(report), PINNED]
        if subprocess.run(command, capture_output=True).returncode:
            return True
        names = [item["metadata"]["name"] for item in json.loads(report.read_text())["install"]]
    return any(name.startswith(("nvidia-", "cuda-", "triton")) for name in names)


def main() -> None:
    if importlib.util.find_spec("torch") is not None:
        return
    if shutil.which("nvidia-smi") or not drags_cuda():
        print(f"installing {PINNED} ...", flush=True)
        subprocess.check_call([*PIP, "install", PINNED])
        return
    print(f"installing a CPU build of {PINNED} ...", flush=True)
    subprocess.check_call([*PIP, "install", "uv"])
    uv = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
    command = [*uv, "--torch-backend", "cpu", PINNED]
    if subprocess.run(command).returncode:
        sys.exit(
            "No CPU build of torch could be fetched, and pip would install several GB of CUDA on a machine without an "
            f"NVIDIA GPU. Install torch yourself ({sys.executable} -m pip install ...), then run this again."
        )


if __name__ == "__main__":
    main()
