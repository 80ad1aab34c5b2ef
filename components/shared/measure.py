"""Arms on one set of examples: ask, verify, tabulate. What the steps that measure have in common."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..contracts.errors import DataError, RecipeError
from ..contracts.metrics import Metric, Summary
from ..contracts.recipe import EvaluateSettings
from ..contracts.rows import Example, Message, Result
from .agreement import CONSISTENCY, swap_consistency
from .calibration import BRIER, ECE, calibration_error, confidence_scores
from .chat import prompt_ids
from .generate import Progress, greedy_responses
from .models import load_tokenizer
from .statistics import summarise
from .tasks.task import Task

BASELINE, FEW_SHOT = "baseline", "few_shot"
SHOWN = ("candidate", "champion", BASELINE, FEW_SHOT, "lexical")
"""Arms that a headline names."""
OF_TABLES = {ECE.name: calibration_error, CONSISTENCY.name: swap_consistency}
"""Metrics that no example has alone."""
Table = dict[str, dict[str, float | int]]
"""By metric name: mean, low, high and n."""


def first_rows(examples: Iterable[Example], most: int) -> list[Example]:
    """Return the examples by id (a hash, so in no meaningful order), at most `most` of them; 0 means all."""
    ordered = sorted(examples, key=lambda example: example.id)
    return ordered[:most] if most else ordered


def measure(
    arm: str,
    folder: str | Path,
    task: Task,
    examples: Sequence[Example],
    settings: EvaluateSettings,
    *,
    prompts: Sequence[Sequence[Message]] | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Return a model's greedy answer to each example, and every metric on it.

    Args:
        arm: What the rows are called.
        folder: The model. A model that was asked the same before answers from the response cache.
        task: Scores the answers.
        examples: What is asked.
        settings: Limits of tokens and of the batch.
        prompts: What to ask in place of the examples' own prompts.
        progress: As for `greedy_responses`.
    """
    tokenizer = load_tokenizer(folder)
    asked = [prompt_ids(tokenizer, prompt) for prompt in prompts or [example.prompt for example in examples]]
    answers = greedy_responses(
        folder,
        asked,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        confidence=BRIER in task.metrics,
        progress=progress,
    )
    return score_answers(arm, task, examples, [(answer.text, answer.confidence) for answer in answers])


def score_answers(
    arm: str, task: Task, examples: Sequence[Example], answers: Sequence[tuple[str, float | None]]
) -> list[Result]:
    """Return every metric on each example's answer.

    Args:
        arm: What the rows are called.
        task: Scores the answers.
        examples: What was asked.
        answers: Text and, where it is known, the probability that the model gave to it.
    """
    return [
        Result(
            arm=arm,
            example_id=example.id,
            group=example.group,
            response=text,
            slices=example.slices,
            scores=_scores(task, text, confidence, example),
        )
        for example, (text, confidence) in zip(examples, answers, strict=True)
    ]


def _scores(task: Task, text: str, confidence: float | None, example: Example) -> dict[str, float | None]:
    found = task.score(text, example.reference)
    found |= {metric.name: None for metric in task.metrics if metric.slice and metric.slice not in example.slices}
    if BRIER not in task.metrics:
        return found
    if confidence is None:
        return {**found, BRIER.name: None}
    return {**found, **confidence_scores(confidence, found[task.metrics[0].name] or 0.0)}


def tabulate(results: Sequence[Result], metrics: Sequence[Metric], confidence: float) -> Table:
    """Return mean and interval of every metric over the results to which it applies; none is left out silently.

    A metric that applies to no result is absent. The first metric is the one that says what is right.
    """
    table: Table = {}
    for metric in metrics:
        if metric.name in OF_TABLES:
            interval = OF_TABLES[metric.name](results, metrics[0].name, confidence)
        else:
            values = scores(results, metric.name)
            interval = summarise(values, metric, confidence) if values else None
        if interval:
            table[metric.name] = {
                "mean": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "n": interval.n,
            }
    return table


def scores(results: Iterable[Result], metric: str) -> list[float]:
    """Return the values of a metric where it applies, in the order of the results."""
    values = (result.scores[metric] for result in results)
    return [value for value in values if value is not None]


def find_metric(metrics: Sequence[Metric], name: str, where: str) -> Metric:
    """Return a task's metric by name.

    Raises:
        RecipeError: The task has none of that name.
    """
    by_name: Mapping[str, Metric] = {metric.name: metric for metric in metrics}
    if name not in by_name:
        raise RecipeError(f"the task has no metric {name!r}", where=where, fix=f"choose one of {list(by_name)}")
    return by_name[name]


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


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results of each arm, in the order in which arms and examples stand."""
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result.arm, []).append(result)
    return arms


def summarise_arms(step: str, results: Sequence[Result], metrics: Sequence[Metric], confidence: float) -> Summary:
    """Return the tables of the report: arm by metric, and the same for every slice.

    Args:
        step: Whose summary it is.
        results: Of all arms.
        metrics: The task's, the primary one first.
        confidence: Of the intervals.
    """
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
        step=step,
        headline=_headline(arms, metrics[0].name),
        metrics=scalars,
        details={"arms": arms, "slices": slices, "metrics": [metric.model_dump(mode="json") for metric in metrics]},
    )


def _headline(arms: Mapping[str, Table], metric: str) -> str:
    shown = [
        f"{arm} {arms[arm][metric]['mean']:.3f} [{arms[arm][metric]['low']:.3f}, {arms[arm][metric]['high']:.3f}]"
        for arm in SHOWN
        if arm in arms and metric in arms[arm]
    ]
    n = max((table[metric]["n"] for table in arms.values() if metric in table), default=0)
    return f"{metric} on {n} held-out examples: {', '.join(shown)}"
