"""The table of behaviours in the docs says what the tests try."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_the_table_is_up_to_date() -> None:
    pytest.importorskip("llama_index.core")
    pytest.importorskip("langchain_core")
    script = Path(__file__).parent.parent / "tools" / "scripts" / "behaviours.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
