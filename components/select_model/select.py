"""Whether a stage's output takes the place of its input: a paired comparison on the validation split."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..contracts.errors import DataError
from ..contracts.metrics import Metric, Summary
from ..contracts.recipe import SelectSettings
from ..contracts.rows import Result
from ..runtime.context import progress
from ..shared.generate import Progress
from ..shared.measure import find_metric, tabulate
from ..shared.statistics import Interval, paired_difference

CHALLENGER, INCUMBENT = "challenger", "incumbent"


@dataclass(frozen=True)
class Choice:
    """Which model goes on, and why."""

    chosen: str
    """`challenger` or `incumbent`."""
    reason: str
    difference: Interval
    """Challenger less incumbent, of `metric`, in its unit."""
    metric: Metric


def choose(
    incumbent: Sequence[Result],
    challenger: Sequence[Result],
    metrics: Sequence[Metric],
    settings: SelectSettings,
    confidence: float,
) -> Choice:
    """Compare two models on the same examples.

    The challenger wins if the metric gets better by `min_gain` (a tie keeps the incumbent, unless `min_gain` allows a
    loss) and the guard does not get worse by more than `guard_margin`. It is a choice between stages, not a proof: that
    is the gate's, on examples that no choice has seen.

    Args:
        incumbent: What went into the stage.
        challenger: What came out of it.
        metrics: The task's.
        settings: The rule.
        confidence: Of the interval that is reported.

    Raises:
        DataError: There is no example to which a metric applies.
        RecipeError: The task has no such metric.
    """
    metric = find_metric(metrics, settings.metric, "select.metric")
    difference = _difference(incumbent, challenger, metric, confidence)
    gain = _gain(difference, metric)
    told = f"{metric.name} {difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}] on {difference.n}"
    if gain < settings.min_gain or (gain <= 0 and settings.min_gain >= 0):
        wanted = f"at least {settings.min_gain:g} better" if settings.min_gain else "better"
        return Choice(INCUMBENT, f"{told}: not {wanted}, so the stage is not built upon", difference, metric)
    if settings.guard:
        guard = find_metric(metrics, settings.guard, "select.guard")
        loss = -_gain(_difference(incumbent, challenger, guard, confidence), guard)
        if loss > settings.guard_margin:
            reason = f"{told}, but {guard.name} is {loss:.3f} worse; {settings.guard_margin:g} is allowed"
            return Choice(INCUMBENT, reason, difference, metric)
    return Choice(CHALLENGER, f"{told}: the stage's output goes on", difference, metric)


def _gain(difference: Interval, metric: Metric) -> float:
    return difference.mean if metric.better == "higher" else -difference.mean


def _difference(
    incumbent: Sequence[Result], challenger: Sequence[Result], metric: Metric, confidence: float
) -> Interval:
    pairs = [
        (new.scores[metric.name], old.scores[metric.name], old.group)
        for old, new in zip(incumbent, challenger, strict=True)
    ]
    known = [(new, old, group) for new, old, group in pairs if new is not None and old is not None]
    if not known:
        raise DataError(
            f"{metric.name!r} applies to no example of the validation split",
            where="validation.parquet",
            fix="raise its share in data.shares, or choose another metric",
        )
    new, old, groups = (list(column) for column in zip(*known, strict=True))
    return paired_difference(new, old, confidence, clusters=groups, low=metric.low, high=metric.high)


def report(place: int) -> Progress:
    """Return what reports the progress of the first (0) or second (1) of two models."""
    return lambda done, total: progress(place * total + done, 2 * total, "answers")


def summarise(
    choice: Choice,
    incumbent: Sequence[Result],
    challenger: Sequence[Result],
    metrics: Sequence[Metric],
    confidence: float,
) -> Summary:
    """Return what the report shows of a choice."""
    difference = {"mean": choice.difference.mean, "low": choice.difference.low, "high": choice.difference.high}
    return Summary(
        step="select_model",
        headline=f"{choice.chosen}: {choice.reason}",
        metrics={"challenger_won": float(choice.chosen == CHALLENGER), "difference": choice.difference.mean},
        details={
            "chosen": choice.chosen,
            "metric": choice.metric.name,
            "incumbent": tabulate(incumbent, metrics, confidence),
            "challenger": tabulate(challenger, metrics, confidence),
            "difference": difference,
            "reason": choice.reason,
        },
    )
