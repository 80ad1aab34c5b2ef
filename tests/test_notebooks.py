"""Notebooks: what they import is there. `test_flagship.py` runs them on a whole run (heavy)."""

import ast
import importlib
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[str]:
    """Return the code of a notebook, cell by cell."""
    book = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_what_a_notebook_imports_is_there(path: Path) -> None:
    imported = [node for cell in cells(path) for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.ImportFrom)]
    assert imported
    for node in imported:
        module = importlib.import_module(node.module or "")
        for name in node.names:
            if not hasattr(module, name.name):
                importlib.import_module(f"{node.module}.{name.name}")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_holds_its_outputs_and_no_path(path: Path) -> None:
    book = json.loads(path.read_text(encoding="utf-8"))
    told = ["".join(one["text"]) for cell in book["cells"] for one in cell.get("outputs", [])]
    assert told
    assert not [text for text in told if "/home/" in text or "/tmp/" in text]
