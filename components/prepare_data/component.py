"""The wire of `prepare_data`. The work is in `prepare.py`."""

from typing import Any

from kfp.dsl import Dataset, Input, Metrics, Output

from ..runtime.step import step


@step("data")
def prepare_data(
    settings: dict[str, Any], accepted: Input[Dataset], data: Output[Dataset], summary: Output[Metrics]
) -> None:
    """Split the accepted rows by hash of their group.

    Args:
        settings: `DataSettings`.
        accepted: `rows.parquet`: examples.
        data: `sft.parquet`, `preference.parquet`, `rl.parquet`, `validation.parquet` and `test.parquet`: examples by
            id; `dropped.jsonl`: id and reason of every row left out.
        summary: Rows and groups of each split, duplicates and conflicts.
    """
    import time
    from pathlib import Path

    from ..contracts.artifacts import read_manifest, seal
    from ..contracts.recipe import DataSettings
    from ..contracts.rows import Example, read_table
    from ..shared.summary import write_summary
    from .prepare import prepare
    from .writing import summarise, write_splits

    began = time.monotonic()
    parents = {"accepted": read_manifest(accepted.path, "rows")}
    table = read_table(Path(accepted.path) / "rows.parquet", Example)
    prepared = prepare(table, DataSettings.model_validate(settings))
    counts = write_splits(prepared, Path(data.path))
    seal(data.path, "splits", parents=parents, counts=counts)
    write_summary(summary, summarise(prepared), seconds=time.monotonic() - began, parents=parents)
