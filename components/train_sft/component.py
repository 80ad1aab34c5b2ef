"""The wire of `train_sft`; the work is in `sft.py`."""

from typing import Any

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from ..runtime.step import step


@step("train")
def train_sft(
    settings: dict[str, Any],
    task: str,
    seed: int,
    base: Input[Model],
    data: Input[Dataset],
    model: Output[Model],
    summary: Output[Metrics],
) -> None:
    """Fine-tune a model on the reference answers of the `sft` split.

    Args:
        settings: `SFTSettings`.
        task: Name of the task; kept in the model's metadata.
        seed: Of the data order.
        base: The model to start from.
        data: `splits`.
        model: The tuned model, adapters merged.
        summary: Loss curve, effect check, examples dropped.
    """
    from ..contracts.recipe import SFTSettings
    from .sft import fine_tune

    fine_tune(SFTSettings.model_validate(settings), task, seed, base.path, data.path, model.path, summary)
