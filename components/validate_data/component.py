"""The wire of `validate_data`: what an engine sees. The work is in `validate.py`."""

import time
from pathlib import Path
from typing import Any

from kfp.dsl import Artifact, Dataset, Input, Metrics, Output

from ..runtime.step import step


@step("data")
def validate_data(
    settings: dict[str, Any],
    task: str,
    raw: Input[Dataset],
    accepted: Output[Dataset],
    quarantine: Output[Dataset],
    docs: Output[Artifact],
    summary: Output[Metrics],
) -> None:
    """Let in the rows that keep their contract, and quarantine the others with reasons.

    Args:
        settings: `DataSettings`.
        task: The task that prompts, groups and verifies.
        raw: A `raw` artifact, or a user's file or folder of .jsonl, .jsonl.gz, .parquet or .csv.
        accepted: `rows.parquet`, `Example` rows.
        quarantine: `quarantine.jsonl`, every refused line with its place, reason and bytes.
        docs: The data docs, a static site; open `index.html`.
        summary: Counts, reasons, and what became of every expectation.
    """
    from ..contracts.recipe import DataSettings
    from ..shared.summary import write_summary
    from ..shared.tasks.task import get_task
    from .validate import Folders, raw_parents, validate

    started = time.monotonic()
    folders = Folders(Path(accepted.path), Path(quarantine.path), Path(docs.path))
    source = Path(raw.path)
    report = validate(source, get_task(task), DataSettings.model_validate(settings), folders)
    seconds = time.monotonic() - started
    write_summary(summary, report.summary(), seconds=seconds, parents=raw_parents(source))
