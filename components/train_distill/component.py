"""The wire of `train_distill`; the work is in `distill.py`."""

from typing import Any

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from ..runtime.step import step


@step("train")
def train_distill(
    settings: dict[str, Any],
    task: str,
    seed: int,
    base: Input[Model],
    teacher: Input[Model],
    data: Input[Dataset],
    model: Output[Model],
    summary: Output[Metrics],
) -> None:
    """Teach a model what another one answers.

    Args:
        settings: `DistillSettings`.
        task: Name of the verifiable task.
        seed: Of the teacher's samples and of the data order.
        base: The student: the model to start from.
        teacher: The model to learn from.
        data: `splits`; reads the prompts of those that the settings name.
        model: The tuned student, adapters merged.
        summary: Loss curve, effect check, the teacher's answers that were left out.
    """
    from ..contracts.recipe import DistillSettings
    from .distill import distill

    wanted = DistillSettings.model_validate(settings)
    distill(wanted, task, seed, base.path, teacher.path, data.path, model.path, summary)
