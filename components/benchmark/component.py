"""The wire of `benchmark`. The work is in `benchmark.py`."""

from typing import Any

from kfp.dsl import Dataset, Input, Metrics, Model, Output

from ..runtime.step import step


@step("train")
def benchmark(
    settings: dict[str, Any],
    data: Input[Dataset],
    baseline: Input[Model],
    candidate: Input[Model],
    champion: Input[Model],
    results: Output[Dataset],
    summary: Output[Metrics],
) -> None:
    """Ask third-party benchmarks of the models that the gate compares.

    Args:
        settings: `BenchmarkSettings`.
        data: `splits`; the training ones are searched for the benchmarks' questions.
        baseline: The base model.
        candidate: The model to be decided on.
        champion: The model in service, or an artifact of kind `none`.
        results: `Result` rows, one per arm and question, and `metrics.json`.
        summary: Mean and interval by arm and metric, and how many questions training has seen.
    """
    from ..contracts.recipe import BenchmarkSettings
    from .benchmark import run

    models = {"baseline": baseline.path, "candidate": candidate.path, "champion": champion.path}
    run(BenchmarkSettings.model_validate(settings), models, data.path, results.path, summary)
