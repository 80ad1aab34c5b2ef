"""The wire of `gate`; the work is in `decide.py`."""

from typing import Any, Optional

from kfp.dsl import Artifact, Dataset, Input, Metrics, Output

from ..runtime.step import step


@step("data")
def gate(
    settings: dict[str, Any],
    task: str,
    results: Input[Dataset],
    verdicts: Input[Dataset],
    judging: Input[Metrics],
    looks: Input[Artifact],
    decision: Output[Artifact],
    summary: Output[Metrics],
    benchmarks: Optional[Input[Dataset]] = None,
) -> bool:
    """Decide whether the candidate may replace the champion.

    Args:
        settings: `GateSettings`.
        task: Name of the task; its metrics say which way is better.
        results: `results` of every arm.
        verdicts: `verdicts` of the judge.
        judging: The judge's summary: whether it may decide.
        looks: The earlier decisions on the same examples, over which α is spent.
        decision: `decision.json`: the decision, one sentence of why, and the evidence.
        summary: The decision as scalars.
        benchmarks: `results` of `benchmark`, if the recipe asks any: their metrics may be criteria too.

    Returns:
        True for `promote`, False for `hold` and for `inconclusive`.
    """
    from ..contracts.recipe import GateSettings
    from .decide import run

    given = {"results": results.path, "verdicts": verdicts.path, "judging": judging.path, "looks": looks.path}
    given |= {"benchmarks": benchmarks.path} if benchmarks else {}
    return run(GateSettings.model_validate(settings), task, given, decision.path, summary)
