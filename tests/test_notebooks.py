"""Every notebook runs from its first to its last cell, and is committed with what its cells gave.

They are committed as SmolLM2 ran them. Here a random model of its shape and tokenizer stands in for it, so that the
code is tried in seconds; ``CACHECLIP_NOTEBOOKS=real`` takes the model itself.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
MODEL = "smollm2-135m-instruct"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(name: str, stand_in: str) -> None:
    model = MODEL if os.environ.get("CACHECLIP_NOTEBOOKS") == "real" else stand_in
    notebook = nbformat.read(FOLDER / name, as_version=4)
    sources = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(MODEL in cell.source for cell in sources)
    for cell in sources:
        cell.source = cell.source.replace(MODEL, model)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()  # raises what a cell raises
    for cell in sources:
        for output in cell.outputs:
            assert output.output_type != "error"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_committed_as_it_ran(name: str) -> None:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs: list[Any] = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"text/html", "image/png"} & kinds, "somebody would rather look than read"
    assert (FOLDER / name).stat().st_size < 1_000_000
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|work|Users)/\w", text), "a path of the machine it ran on"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_prose_stands_between_short_cells(name: str) -> None:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    assert notebook.cells[0].cell_type == "markdown"
    kinds = [cell.cell_type for cell in notebook.cells]
    assert not any(kinds[i : i + 4] == ["code"] * 4 for i in range(len(kinds)))
    assert all(len(cell.source.splitlines()) <= 40 for cell in notebook.cells)
