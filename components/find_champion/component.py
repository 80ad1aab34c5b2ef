"""The wire of `find_champion`. The work is in `champion.py`."""

from kfp.dsl import Input, Model, Output

from assay.components.runtime.step import step


@step("data")
def find_champion(name: str, candidate: Input[Model], champion: Output[Model]) -> int:
    """Fetch the model that the candidate must beat.

    Args:
        name: The registered model.
        candidate: The model that wants to be champion.
        champion: The champion's files with their manifest; an empty artifact of kind `none` when there is none.

    Returns:
        The champion's version; 0 for none.
    """
    from assay.components.contracts.artifacts import read_manifest

    from .champion import opponent, write

    content = read_manifest(candidate.path, "model", verify=False).content
    return write(opponent(name, content), champion.path)
