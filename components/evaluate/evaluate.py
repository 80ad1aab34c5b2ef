"""Every arm on the same held-out examples: what the gate compares."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..contracts.errors import DataError
from ..contracts.metrics import Metric, Summary
from ..contracts.recipe import EvaluateSettings
from ..contracts.rows import Example, Message, Result
from ..runtime.context import progress
from ..shared.chat import few_shot_prompt
from ..shared.measure import Table, measure, tabulate
from ..shared.tasks.task import Task

BASELINE, FEW_SHOT = "baseline", "few_shot"


def choose_shots(examples: Sequence[Example], count: int) -> list[Example]:
    """Return the first examples by id (a hash), no two of one group.

    Raises:
        DataError: There are not that many groups.
    """
    by_group: dict[str, Example] = {}
    for example in sorted(examples, key=lambda example: example.id):
        by_group.setdefault(example.group, example)
    if len(by_group) < count:
        raise DataError(
            f"the few-shot arm wants {count} worked examples, and the sft split has {len(by_group)} groups",
            where="sft.parquet",
            fix="lower evaluate.few_shot, or give more rows",
        )
    return list(by_group.values())[:count]


def measure_arms(
    models: Mapping[str, str | Path],
    task: Task,
    examples: Sequence[Example],
    shots: Sequence[Example],
    settings: EvaluateSettings,
) -> list[Result]:
    """Return one result per arm and example, arm by arm; the few-shot arm follows the baseline.

    Args:
        models: Model folder by arm, the baseline among them.
        task: Scores the answers.
        examples: Held out.
        shots: Worked examples for the few-shot arm; none leaves the arm out.
        settings: Limits of tokens and of the batch.

    Raises:
        DataError: There is no example.
    """
    if not examples:
        raise DataError("the test split is empty", where="test.parquet", fix="raise its share in data.shares")
    arms: list[tuple[str, str | Path, list[list[Message]] | None]] = []
    for arm, folder in models.items():
        arms.append((arm, folder, None))
        if arm == BASELINE and shots:
            arms.append((FEW_SHOT, folder, [few_shot_prompt(example.prompt, shots) for example in examples]))
    results: list[Result] = []
    for arm, folder, prompts in arms:

        def report(done: int, total: int, before: int = len(results)) -> None:
            progress(before + done, total * len(arms), "answers")

        results += measure(arm, folder, task, examples, settings, prompts=prompts, progress=report)
    return results


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results of each arm, in the order in which arms and examples stand."""
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result.arm, []).append(result)
    return arms


def summarise(results: Sequence[Result], metrics: Sequence[Metric], confidence: float) -> Summary:
    """Return the tables of the report: arm by metric, and the same for every slice."""
    arms = {arm: tabulate(rows, metrics, confidence) for arm, rows in by_arm(results).items()}
    names = sorted({label for result in results for label in result.slices})
    slices: dict[str, dict[str, Table]] = {
        name: {
            arm: tabulate([row for row in rows if name in row.slices], metrics, confidence)
            for arm, rows in by_arm(results).items()
        }
        for name in names
    }
    scalars = {f"{arm}_{metric}": float(cell["mean"]) for arm, table in arms.items() for metric, cell in table.items()}
    return Summary(
        step="evaluate",
        headline=_headline(arms, metrics[0].name),
        metrics=scalars,
        details={"arms": arms, "slices": slices, "metrics": [metric.model_dump(mode="json") for metric in metrics]},
    )


def _headline(arms: Mapping[str, Table], metric: str) -> str:
    shown = [
        f"{arm} {arms[arm][metric]['mean']:.3f} [{arms[arm][metric]['low']:.3f}, {arms[arm][metric]['high']:.3f}]"
        for arm in ("candidate", "champion", BASELINE, FEW_SHOT)
        if arm in arms and metric in arms[arm]
    ]
    n = max((table[metric]["n"] for table in arms.values() if metric in table), default=0)
    return f"{metric} on {n} held-out examples: {', '.join(shown)}"
