"""The wire of `write_report`. The work is in `report.py`."""

from typing import Any, Optional

from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Output

from ..runtime.step import step


@step("data")
def write_report(
    recipe: dict[str, Any],
    version: int,
    validation: Input[Metrics],
    splits: Input[Metrics],
    decision: Input[Artifact],
    results: Input[Dataset],
    evaluation: Input[Metrics],
    judging: Input[Metrics],
    data: Input[Dataset],
    report: Output[HTML],
    pretrain: Optional[Input[Metrics]] = None,
    sft: Optional[Input[Metrics]] = None,
    distill: Optional[Input[Metrics]] = None,
    candidates: Optional[Input[Metrics]] = None,
    pairs: Optional[Input[Metrics]] = None,
    preference: Optional[Input[Metrics]] = None,
    reward_model: Optional[Input[Metrics]] = None,
    rl: Optional[Input[Metrics]] = None,
    classifier: Optional[Input[Metrics]] = None,
    select_pretrain: Optional[Input[Metrics]] = None,
    select_sft: Optional[Input[Metrics]] = None,
    select_distill: Optional[Input[Metrics]] = None,
    select_preference: Optional[Input[Metrics]] = None,
    select_rl: Optional[Input[Metrics]] = None,
    select_classifier: Optional[Input[Metrics]] = None,
    embedding: Optional[Input[Metrics]] = None,
    benchmarking: Optional[Input[Metrics]] = None,
) -> None:
    """Tell one run on one page: the decision first, then its evidence.

    Args:
        recipe: The whole `Recipe`.
        version: The registered version, 0 when the candidate was not promoted.
        validation: Summary of `validate_data`.
        splits: Summary of `prepare_data`.
        decision: The gate's decision.
        results: What every arm answered.
        evaluation: Summary of `evaluate`.
        judging: Summary of `judge`.
        data: The splits; reads test.parquet for prompts and references.
        report: One HTML file that asks for no other.
        pretrain: Summary of that training step; as all below, None where the recipe has no such stage.
        sft: Summary of that training step.
        distill: Summary of that training step.
        candidates: Summary of `sample_candidates`.
        pairs: Summary of `build_preferences`.
        preference: Summary of that training step.
        reward_model: Summary of `train_reward`.
        rl: Summary of that training step.
        classifier: Summary of that training step.
        select_pretrain: That step's verdict on its own output.
        select_sft: Whether that stage's model replaced its input.
        select_distill: As `select_sft`.
        select_preference: As `select_sft`.
        select_rl: As `select_sft`.
        select_classifier: As `select_sft`.
        embedding: Summary of that training step.
        benchmarking: Summary of `benchmark`, if the recipe asks any.
    """
    from pathlib import Path

    from ..contracts.artifacts import write_atomically
    from ..contracts.recipe import Recipe
    from .report import Run, render

    given = {
        "validation": validation,
        "splits": splits,
        "pretrain": pretrain,
        "select_pretrain": select_pretrain,
        "sft": sft,
        "select_sft": select_sft,
        "distill": distill,
        "select_distill": select_distill,
        "candidates": candidates,
        "pairs": pairs,
        "reward_model": reward_model,
        "preference": preference,
        "select_preference": select_preference,
        "rl": rl,
        "select_rl": select_rl,
        "classifier": classifier,
        "select_classifier": select_classifier,
        "embedding": embedding,
        "evaluation": evaluation,
        "benchmarking": benchmarking,
        "judging": judging,
    }
    summaries = {name: artifact.path for name, artifact in given.items() if artifact is not None}
    run = Run.read(Recipe.model_validate(recipe), int(version), decision.path, results.path, data.path, summaries)
    write_atomically(Path(report.path), render(run))
