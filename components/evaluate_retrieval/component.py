"""The wire of `evaluate_retrieval`. The work is in `retrieve.py`."""

from typing import Any

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from ..runtime.step import step


@step("train")
def evaluate_retrieval(
    settings: dict[str, Any],
    task: str,
    data: Input[Dataset],
    baseline: Input[Model],
    candidate: Input[Model],
    champion: Input[Model],
    results: Output[Dataset],
    summary: Output[Metrics],
) -> None:
    """Search the corpus by every arm, let the base model answer from what was found, and score both.

    Args:
        settings: `EvaluateSettings`.
        task: Name of a retrieval task.
        data: `splits`; asks test.parquet, searches the passages of all splits, shows the reader some of sft.parquet.
        baseline: The base model: an encoder as it is, and the reader of every arm.
        candidate: The encoder to be decided on.
        champion: The encoder in service, or an artifact of kind `none`.
        results: `Result` rows, one per arm and question.
        summary: Mean and interval by arm and metric, overall and by slice.
    """
    import time
    from pathlib import Path

    from ..contracts.artifacts import read_manifest, seal
    from ..contracts.recipe import EvaluateSettings
    from ..contracts.rows import Result, write_rows
    from ..shared.measure import by_arm, summarise_arms
    from ..shared.summary import write_summary
    from ..shared.tasks.task import get_task
    from . import retrieve as work

    start = time.monotonic()
    wanted, chosen = EvaluateSettings.model_validate(settings), get_task(task)
    artifacts = {"baseline": baseline, "candidate": candidate, "champion": champion}
    manifests = {arm: read_manifest(model.path, "model", "none") for arm, model in artifacts.items()}
    parents = {"data": read_manifest(data.path, "splits"), **manifests}
    models = {arm: artifacts[arm].path for arm, manifest in manifests.items() if manifest.kind == "model"}
    rows = work.measure_arms(models, chosen, work.Asked.read(data.path, wanted), wanted)
    count = write_rows(Path(results.path) / "results.parquet", rows, Result)
    # An arm without a model of its own is what the reader makes of another search, and the reader is the base model.
    arms = {arm: manifests.get(arm, manifests["baseline"]).content for arm in by_arm(rows)}
    seal(results.path, "results", parents=parents, counts={"results": count}, metadata={"arms": arms})
    told = summarise_arms("evaluate_retrieval", rows, chosen.metrics, wanted.confidence)
    write_summary(summary, told, seconds=time.monotonic() - start, parents=parents)
