"""The wire of `register_model`. The work is in `register.py`."""

from typing import Any

from kfp.dsl import Artifact, Dataset, Input, Model

from assay.components.runtime.step import step


@step("data")
def register_model(
    name: str,
    recipe: dict[str, Any],
    candidate: Input[Model],
    decision: Input[Artifact],
    data: Input[Dataset],
    results: Input[Dataset],
) -> int:
    """Make a model that passed the gate a version of `name`, with its evidence.

    Args:
        name: The registered model; made when new.
        recipe: The whole `Recipe`.
        candidate: The model.
        decision: The gate's decision to promote exactly this model.
        data: The splits it was trained and tested on.
        results: What every arm answered.

    Returns:
        The version; the one it already has when the same bytes were registered before.
    """
    from assay.components.contracts.recipe import Recipe

    from .register import Evidence, register

    evidence = Evidence.read(Recipe.model_validate(recipe), candidate.path, decision.path, data.path, results.path)
    return register(name, evidence)
