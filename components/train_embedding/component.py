"""The wire of `train_embedding`; the work is in `contrastive.py`."""

from typing import Any

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from ..runtime.step import step


@step("train")
def train_embedding(
    settings: dict[str, Any],
    task: str,
    seed: int,
    base: Input[Model],
    data: Input[Dataset],
    model: Output[Model],
    summary: Output[Metrics],
) -> None:
    """Fine-tune a language model as an encoder that puts a question near the passage that answers it.

    Args:
        settings: `EmbeddingSettings`.
        task: Name of the task; kept in the model's metadata.
        seed: Of the data order.
        base: The model to start from, which also finds the hard negatives.
        data: `splits`; questions and passages of the `sft` split.
        model: The tuned model, adapters merged, with `embedding.json`.
        summary: Loss curve, effect check, rows dropped.
    """
    from ..contracts.recipe import EmbeddingSettings
    from .contrastive import fine_tune

    fine_tune(EmbeddingSettings.model_validate(settings), task, seed, base.path, data.path, model.path, summary)
