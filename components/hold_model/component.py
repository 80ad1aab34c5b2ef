"""The wire of `hold_model`. The work is in `hold.py`."""

from kfp.dsl import Artifact, Input, Model

from assay.components.runtime.step import step


@step("data")
def hold_model(name: str, candidate: Input[Model], decision: Input[Artifact]) -> int:
    """Record that a candidate was not promoted, and why.

    Args:
        name: The registered model.
        candidate: The model that was held.
        decision: The gate's decision about it.

    Returns:
        0: there is no new version.
    """
    from .hold import hold

    hold(name, candidate.path, decision.path)
    return 0
