"""The wire of `evaluate`. The work is in `evaluate.py`."""

from typing import Any, Optional

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from ..runtime.step import step


@step("train")
def evaluate(
    settings: dict[str, Any],
    task: str,
    data: Input[Dataset],
    baseline: Input[Model],
    candidate: Input[Model],
    champion: Input[Model],
    results: Output[Dataset],
    summary: Output[Metrics],
    pretrain: Optional[Input[Model]] = None,
    sft: Optional[Input[Model]] = None,
    distill: Optional[Input[Model]] = None,
    preference: Optional[Input[Model]] = None,
    rl: Optional[Input[Model]] = None,
    classifier: Optional[Input[Model]] = None,
) -> None:
    """Measure every arm on the same held-out examples.

    Args:
        settings: `EvaluateSettings`.
        task: Name of the verifiable task.
        data: `splits`; reads test.parquet, and sft.parquet for the few-shot arm.
        baseline: The base model; also asked with worked examples in the prompt.
        candidate: The model to be decided on.
        champion: The model in service, or an artifact of kind `none`.
        results: `Result` rows, one per arm and example.
        summary: Mean and interval by arm and metric, overall and by slice.
        pretrain: Output of that stage, if the recipe has it.
        sft: As `pretrain`.
        distill: As `pretrain`.
        preference: As `pretrain`.
        rl: As `pretrain`.
        classifier: As `pretrain`.
    """
    import time
    from pathlib import Path

    from ..contracts.artifacts import read_manifest, seal
    from ..contracts.recipe import EvaluateSettings
    from ..contracts.rows import Example, Result, read_rows, write_rows
    from ..shared.measure import FEW_SHOT, by_arm, choose_shots, first_rows, summarise_arms
    from ..shared.summary import write_summary
    from ..shared.tasks.task import get_task
    from . import evaluate as work

    start = time.monotonic()
    wanted, chosen = EvaluateSettings.model_validate(settings), get_task(task)
    stages = {"pretrain": pretrain, "sft": sft, "distill": distill, "preference": preference, "rl": rl}
    stages["classifier"] = classifier
    given = {**stages, "candidate": candidate, "champion": champion}
    artifacts = {"baseline": baseline} | {arm: model for arm, model in given.items() if model is not None}
    manifests = {arm: read_manifest(model.path, "model", "none") for arm, model in artifacts.items()}
    models = {arm: artifacts[arm].path for arm, manifest in manifests.items() if manifest.kind == "model"}
    parents = {"data": read_manifest(data.path, "splits"), **manifests}
    examples = first_rows(read_rows(Path(data.path) / "test.parquet", Example), wanted.max_rows)
    shots = choose_shots(read_rows(Path(data.path) / "sft.parquet", Example), wanted.few_shot)
    asked, endpoints = work.measure_endpoints(chosen, examples, shots, wanted)
    rows = work.measure_arms(models, chosen, examples, shots, wanted) + asked
    count = write_rows(Path(results.path) / "results.parquet", rows, Result)
    digests = {arm: str(told["digest"]) for arm, told in endpoints.items()}
    digests |= {arm: manifest.content for arm, manifest in manifests.items()} | {
        FEW_SHOT: manifests["baseline"].content
    }
    arms = {arm: digests[arm] for arm in by_arm(rows)}
    seal(results.path, "results", parents=parents, counts={"results": count}, metadata={"arms": arms})
    told = summarise_arms("evaluate", rows, chosen.metrics, wanted.confidence)
    if endpoints:
        told = told.model_copy(update={"details": {**told.details, "endpoints": endpoints}})
    write_summary(summary, told, seconds=time.monotonic() - start, parents=parents)
