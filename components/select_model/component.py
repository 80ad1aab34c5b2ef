"""The wire of `select_model`. The work is in `select.py`."""

from typing import Any

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from ..runtime.step import step


@step("train")
def select_model(
    settings: dict[str, Any],
    evaluation: dict[str, Any],
    task: str,
    incumbent: Input[Model],
    challenger: Input[Model],
    data: Input[Dataset],
    best: Output[Model],
    summary: Output[Metrics],
) -> str:
    """Build on a training stage only if it helped.

    Args:
        settings: `SelectSettings`.
        evaluation: `EvaluateSettings`.
        task: Name of the verifiable task.
        incumbent: The model that went into the stage.
        challenger: The model that came out of it.
        data: `splits`; reads validation.parquet.
        best: The chosen one, file by file.
        summary: Both models' metrics and the paired difference.

    Returns:
        "challenger" or "incumbent".
    """
    import time
    from pathlib import Path

    from ..contracts.artifacts import link_tree, read_manifest
    from ..contracts.recipe import EvaluateSettings, SelectSettings
    from ..contracts.rows import Example, read_rows
    from ..shared.measure import first_rows, measure
    from ..shared.summary import write_summary
    from ..shared.tasks.task import get_task
    from . import select

    start = time.monotonic()
    rule, wanted, chosen = (
        SelectSettings.model_validate(settings),
        EvaluateSettings.model_validate(evaluation),
        get_task(task),
    )
    models = {"incumbent": incumbent.path, "challenger": challenger.path}
    parents = {arm: read_manifest(path, "model") for arm, path in models.items()}
    parents["data"] = read_manifest(data.path, "splits")
    examples = first_rows(read_rows(Path(data.path) / "validation.parquet", Example), wanted.max_rows)
    measured = {
        arm: measure(arm, path, chosen, examples, wanted, progress=select.report(place))
        for place, (arm, path) in enumerate(models.items())
    }
    old, new = measured["incumbent"], measured["challenger"]
    choice = select.choose(old, new, chosen.metrics, rule, wanted.confidence)
    link_tree(models[choice.chosen], best.path)
    told = select.summarise(choice, old, new, chosen.metrics, wanted.confidence)
    write_summary(summary, told, seconds=time.monotonic() - start, parents=parents)
    return choice.chosen
