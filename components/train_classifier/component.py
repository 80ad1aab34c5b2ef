"""The wire of `train_classifier`; the work is in `extract.py` (features) and `fit.py` (the classifier)."""

from typing import Any

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from ..runtime.step import step


@step("train")
def train_classifier(
    settings: dict[str, Any],
    task: str,
    seed: int,
    base: Input[Model],
    data: Input[Dataset],
    model: Output[Model],
    summary: Output[Metrics],
) -> None:
    """Fit a classifier on a frozen model's features of the `sft` split; the references are the labels.

    Args:
        settings: `ClassifierSettings`.
        task: Name of the task; kept in the model's metadata.
        seed: Of the folds.
        base: The model whose features are used; its weights stay as they are.
        data: `splits`; reads sft.parquet, and validation.parquet for the temperature.
        model: The base model's files with the classifier beside them.
        summary: Objective by iteration, candidates by held-out loss, calibration before and after.
    """
    import time

    from ..contracts.artifacts import read_manifest
    from ..contracts.recipe import ClassifierSettings
    from ..shared.summary import write_summary
    from .train import train

    started = time.monotonic()
    parents = {"base": read_manifest(base.path, "model"), "data": read_manifest(data.path, "splits")}
    told = train(ClassifierSettings.model_validate(settings), task, seed, base.path, data.path, model.path, parents)
    write_summary(summary, told, seconds=time.monotonic() - started, parents=parents)
