"""The wire of `train_reward`; the work is in `reward.py`."""

from typing import Any

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from ..runtime.step import step


@step("train")
def train_reward(
    settings: dict[str, Any],
    task: str,
    seed: int,
    base: Input[Model],
    pairs: Input[Dataset],
    model: Output[Model],
    summary: Output[Metrics],
) -> None:
    """Train a reward model on preference pairs (Bradley–Terry).

    Args:
        settings: `RewardModelSettings`.
        task: Name of the task; kept in the model's metadata.
        seed: Of the head's first weights and of the data order.
        base: The language model to start from.
        pairs: `pairs`.
        model: `reward_model`: the language model with a scalar head, and `reward.json`.
        summary: Loss curve, accuracy on held-out pairs with its interval, effect check.
    """
    from ..contracts.recipe import RewardModelSettings
    from .reward import fit

    fit(RewardModelSettings.model_validate(settings), task, seed, base.path, pairs.path, model.path, summary)
