"""What the tests of both integrations ask of the applications in examples/."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str, version: str = "after") -> ModuleType:
    path = EXAMPLES / name / f"{version}.py"
    spec = importlib.util.spec_from_file_location(f"examples_{name}_{version}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changed_lines(name: str) -> int:
    """How many lines of the application differ, its imports left out."""
    before, after = (
        [line for line in (EXAMPLES / name / f"{version}.py").read_text().splitlines() if not _is_import(line)]
        for version in ("before", "after")
    )
    return sum(line.startswith("+ ") for line in difflib.ndiff(before, after))


def _is_import(line: str) -> bool:
    return line.startswith(("from ", "import ")) or not line.strip()
