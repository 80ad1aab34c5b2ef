"""The wire of `train_rl`; the work is in `grpo.py`."""

from typing import Any

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from ..runtime.step import step


@step("train")
def train_rl(
    settings: dict[str, Any],
    task: str,
    seed: int,
    base: Input[Model],
    data: Input[Dataset],
    model: Output[Model],
    summary: Output[Metrics],
) -> None:
    """Tune a model by the rewards of the task's verifier (GRPO).

    Args:
        settings: `RLSettings`.
        task: Name of the task whose verifier rewards.
        seed: Of the data order and of the samples.
        base: The model to start from.
        data: `splits`; the `rl` split is used.
        model: The tuned model, adapters merged.
        summary: Reward and loss curve, effect check, groups without a signal.
    """
    from ..contracts.recipe import RLSettings
    from .grpo import tune

    tune(RLSettings.model_validate(settings), task, seed, base.path, data.path, model.path, summary)
