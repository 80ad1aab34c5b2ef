"""The wire of `train_rl`; the work is in `grpo.py` and `ppo.py`."""

from typing import Any, Optional

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
    reward: Optional[Input[Model]] = None,
) -> None:
    """Tune a model by rewards: GRPO on those of the task's verifier, PPO on those or on a reward model's.

    Args:
        settings: `RLSettings`.
        task: Name of the task whose verifier rewards.
        seed: Of the data order and of the samples.
        base: The model to start from.
        data: `splits`; the `rl` split is used.
        model: The tuned model, adapters merged.
        summary: Reward and loss curve, effect check, groups without a signal or KL.
        reward: `reward_model`; PPO alone takes one.
    """
    from ..contracts.recipe import RLSettings

    chosen = RLSettings.model_validate(settings)
    if chosen.algorithm == "ppo":
        from . import ppo

        judged_by = reward.path if reward else None
        ppo.tune(chosen, task, seed, base.path, data.path, model.path, summary, judged_by)
    else:
        from . import grpo

        grpo.tune(chosen, task, seed, base.path, data.path, model.path, summary)
