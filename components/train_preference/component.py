"""The wire of `train_preference`; the work is in `preference.py`."""

from typing import Any

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from ..runtime.step import step


@step("train")
def train_preference(
    settings: dict[str, Any],
    task: str,
    seed: int,
    base: Input[Model],
    pairs: Input[Dataset],
    model: Output[Model],
    summary: Output[Metrics],
) -> None:
    """Tune a model on preference pairs (DPO).

    Args:
        settings: `PreferenceSettings`.
        task: Name of the task; kept in the model's metadata.
        seed: Of the data order.
        base: The model to start from, and the reference it is pulled back to.
        pairs: `pairs`.
        model: The tuned model, adapters merged.
        summary: Loss curve, effect check, pairs dropped.
    """
    from ..contracts.recipe import PreferenceSettings
    from .preference import tune

    tune(PreferenceSettings.model_validate(settings), task, seed, base.path, pairs.path, model.path, summary)
