"""The wire of `deploy_model`. The work is in `deploy.py`, `parity.py` and `server.py`."""

from typing import Any

from kfp.dsl import Dataset, Input, Model

from assay.components.runtime.step import step


@step("serve")
def deploy_model(
    name: str, version: int, settings: dict[str, Any], task: str, candidate: Input[Model], data: Input[Dataset]
) -> int:
    """Let a registered version answer held-out prompts through the real server, then make it champion or let it wait.

    Args:
        name: The registered model.
        version: Of the MLflow registry.
        settings: `EvaluateSettings`; `golden_prompts` and `max_new_tokens` are used.
        task: Whose prompts are asked.
        candidate: The trained model, as it was measured.
        data: The splits; prompts come from the test split.

    Returns:
        The version, now champion; 0 while it awaits approval.
    """
    from assay.components.contracts.recipe import EvaluateSettings

    from .deploy import deploy

    return deploy(name, int(version), EvaluateSettings.model_validate(settings), candidate.path, data.path)
