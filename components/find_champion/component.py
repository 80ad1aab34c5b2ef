"""The wire of `find_champion`. The work is in `champion.py`."""

from typing import Any

from kfp.dsl import Artifact, Dataset, Input, Model, Output

from assay.components.runtime.step import step


@step("data")
def find_champion(
    name: str,
    policy: dict[str, Any],
    evaluation: dict[str, Any],
    measurement: str,
    candidate: Input[Model],
    data: Input[Dataset],
    champion: Output[Model],
    looks: Output[Artifact],
) -> int:
    """Fetch the model that the candidate must beat, and count what its held-out examples were asked before.

    Args:
        name: The registered model.
        policy: `GateSettings`: the same question under another policy is a new one.
        evaluation: `EvaluateSettings`: how many of the examples are measured.
        measurement: `Recipe.measurement`: how they are; measured otherwise, it is a new question too.
        candidate: The model that wants to be champion.
        data: `splits`; reads test.parquet.
        champion: The champion's files with their manifest; an empty artifact of kind `none` when there is none.
        looks: The earlier decisions on these examples.

    Returns:
        The champion's version; 0 for none.
    """
    from pathlib import Path

    from assay.components.contracts.artifacts import read_manifest
    from assay.components.contracts.recipe import EvaluateSettings, GateSettings

    from .champion import opponent, write, write_looks

    content = read_manifest(candidate.path, "model", verify=False).content
    found = opponent(name, content)
    splits = (Path(data.path), read_manifest(data.path, "splits"))
    most = EvaluateSettings.model_validate(evaluation).max_rows
    write_looks(name, content, found, GateSettings.model_validate(policy), measurement, splits, most, looks.path)
    return write(found, champion.path)
