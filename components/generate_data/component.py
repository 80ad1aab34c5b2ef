"""The wire of `generate_data`."""

from kfp.dsl import Dataset, Output

from ..runtime.step import step


@step("data")
def generate_data(task: str, rows: int, seed: int, raw: Output[Dataset]) -> None:
    """Write raw rows whose answers are true by construction.

    Args:
        task: A task with a generator.
        rows: Number of rows; the first n of a longer run with the same seed are the rows of a run of n.
        seed: Equal seeds give equal bytes.
        raw: `rows.jsonl`, one `{"messages": [...]}` a line.
    """
    from ..contracts.artifacts import seal
    from .generate import write_rows

    written = write_rows(task, int(rows), int(seed), raw.path)
    seal(raw.path, "raw", counts={"rows": written}, metadata={"task": task, "seed": int(seed)})
