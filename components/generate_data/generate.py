"""Generated rows as JSON lines."""

import json
from pathlib import Path

from ..runtime.context import progress
from ..shared.tasks.task import get_task

FILE = "rows.jsonl"
REPORT_EVERY = 10_000
"""Rows between progress lines."""


def write_rows(task: str, rows: int, seed: int, folder: str | Path) -> int:
    """Write the rows of a task's generator and return their number.

    Args:
        task: Its name.
        rows: How many.
        seed: Of the generator.
        folder: Made if it is missing; gets `rows.jsonl`.

    Raises:
        RecipeError: There is no such task, it has no generator, or it knows fewer rows.
    """
    source = get_task(task).generate(rows, seed)
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for written, row in enumerate(source, start=1):
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
            if written % REPORT_EVERY == 0:
                progress(written, rows, "rows")
    return written
