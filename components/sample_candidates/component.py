"""The wire of `sample_candidates`. The work is in `sample.py`."""

from typing import Any

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from ..runtime.step import step


@step("train")
def sample_candidates(
    settings: dict[str, Any],
    task: str,
    seed: int,
    model: Input[Model],
    data: Input[Dataset],
    candidates: Output[Dataset],
    summary: Output[Metrics],
) -> None:
    """Let the model answer the preference split several times, and score every answer.

    Args:
        settings: `PairSettings`.
        task: Name of the verifiable task.
        seed: Of the samples.
        model: The model that will be trained on the pairs.
        data: `splits`; reads preference.parquet.
        candidates: `Candidate` rows.
        summary: Share of right answers, mean score.
    """
    import time
    from pathlib import Path

    from ..contracts.artifacts import read_manifest, seal
    from ..contracts.recipe import PairSettings
    from ..contracts.rows import Candidate, Example, read_rows, write_rows
    from ..runtime.context import work_folder
    from ..shared.generate import load_generator
    from ..shared.summary import write_summary
    from ..shared.tasks.task import get_task
    from . import sample

    start = time.monotonic()
    parents = {"model": read_manifest(model.path, "model"), "data": read_manifest(data.path, "splits")}
    examples = read_rows(Path(data.path) / "preference.parquet", Example)
    wanted = PairSettings.model_validate(settings)
    generator = load_generator(model.path)
    rows = sample.sample_candidates(generator, get_task(task), examples, wanted, seed, work_folder())
    count = write_rows(Path(candidates.path) / "candidates.parquet", rows, Candidate)
    seal(candidates.path, "candidates", parents=parents, counts={"candidates": count})
    write_summary(summary, sample.summarise(rows), seconds=time.monotonic() - start, parents=parents)
