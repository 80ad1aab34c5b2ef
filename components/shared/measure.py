"""One model on one set of examples: ask, verify, tabulate. What evaluation and selection have in common."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..contracts.errors import RecipeError
from ..contracts.metrics import Metric
from ..contracts.recipe import EvaluateSettings
from ..contracts.rows import Example, Message, Result
from .calibration import BRIER, ECE, calibration_error, confidence_scores
from .chat import prompt_ids
from .generate import Generation, Progress, greedy_responses
from .models import load_tokenizer
from .statistics import summarise
from .tasks.task import Task

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
    return [
        Result(
            arm=arm,
            example_id=example.id,
            group=example.group,
            response=answer.text,
            slices=example.slices,
            scores=_scores(task, answer, example.reference),
        )
        for example, answer in zip(examples, answers, strict=True)
    ]


def _scores(task: Task, answer: Generation, reference: str) -> dict[str, float | None]:
    found = task.score(answer.text, reference)
    if answer.confidence is None:
        return found
    return {**found, **confidence_scores(answer.confidence, found[task.metrics[0].name] or 0.0)}


def tabulate(results: Sequence[Result], metrics: Sequence[Metric], confidence: float) -> Table:
    """Return mean and interval of every metric over the results to which it applies; none is left out silently.

    A metric that applies to no result is absent. The first metric is the one that says what is right.
    """
    table: Table = {}
    for metric in metrics:
        if metric.name == ECE.name:
            interval = calibration_error(results, metrics[0].name, confidence)
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
