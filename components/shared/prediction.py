"""Prediction-powered inference: an honest mean from a judge's opinion of all examples and people's labels of some."""

from collections.abc import Hashable, Sequence

import numpy as np

from ..contracts.rows import Verdict
from .statistics import Floats, Interval, by_cluster, gaffke_draws, share_of_draws

POINTS = {"a": 1.0, "tie": 0.5, "b": 0.0}
"""Of arm a, by the winner of a comparison."""


class Corrected(Interval):
    """A mean that predictions helped to estimate, and that labels keep right; `n` counts the labelled examples."""

    predicted: int
    """Examples of which there is a prediction only."""
    power: float
    """λ of PPI++: 0 where the predictions count for nothing, 1 where they count in full."""
    p_value: float
    """One-sided, against a mean of at most the bar."""


def corrected_win_rate(verdicts: Sequence[Verdict], confidence: float = 0.95) -> Corrected | None:
    """Return how often arm a is better, a tie counted as half, with its test against one half; None without a label."""
    labels = [None if verdict.label is None else POINTS[verdict.label] for verdict in verdicts]
    said = [POINTS[verdict.winner] for verdict in verdicts]
    return prediction_powered(labels, said, confidence, bar=0.5, clusters=[verdict.group for verdict in verdicts])


def prediction_powered(
    labels: Sequence[float | None],
    predictions: Sequence[float],
    confidence: float = 0.95,
    *,
    bar: float = 0.0,
    clusters: Sequence[Hashable] | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> Corrected | None:
    """Return the mean label of all examples, from labels of some and predictions of all.

    The estimate is that of prediction-powered inference (Angelopoulos et al. 2023, arXiv:2301.09633), tuned as in PPI++
    (arXiv:2311.01453): mean(y) + λ·(mean(f̃) − mean(f)) with labels y and predictions f of the n labelled examples, f̃ of
    the N others, and λ = cov(y, f) / ((1 + n/N)·var(f)) within [0, 1]. Predictions do not bias it, whatever they are
    worth, and good ones make it know more than the labels alone.

    The papers' interval is normal, and collapses where n labels are equal; ours adds draws of both means under Gaffke's
    bound (`statistics`) and tends to theirs. With few labels it can be wider than without predictions: then λ is 0.

    Args:
        labels: None where there is none; which examples have one must not depend on what it would be.
        predictions: Of all examples.
        confidence: Two-sided.
        bar: What the mean is tested against.
        clusters: Key of each example.
        low: Smallest possible value of a label and of a prediction.
        high: Largest possible value of either.

    Returns:
        None where there is no label.
    """
    known = [place for place, label in enumerate(labels) if label is not None]
    rest = [place for place, label in enumerate(labels) if label is None]
    if not known:
        return None
    y, f = np.asarray([labels[place] for place in known], np.float64), np.asarray(predictions, np.float64)

    def parts(places: Sequence[int], values: Floats) -> tuple[Floats, Floats]:
        return by_cluster(values, [clusters[place] for place in places] if clusters is not None else None)

    def estimate(power: float) -> Corrected:
        tail = (1 - confidence) / 2
        errors, others = parts(known, y - power * f[known]), parts(rest, power * f[rest]) if power else None

        def drawn(error: float, prediction: float) -> Floats:
            """Draw the mean, with one more error and one more prediction that were not seen."""
            means = gaffke_draws(*errors, error, tail)
            return means + _shuffled(gaffke_draws(*others, prediction, tail)) if others else means

        lower, upper = drawn(low - power * high, power * low), drawn(high - power * low, power * high)
        return Corrected(
            mean=float((y - power * f[known]).mean() + (power * f[rest].mean() if power else 0.0)),
            low=max(low, float(np.quantile(lower, tail))),
            high=min(high, float(np.quantile(upper, 1 - tail))),
            n=len(known),
            predicted=len(rest),
            power=power,
            p_value=share_of_draws(lower <= bar),
        )

    found = [estimate(power) for power in sorted({0.0, _power(y, f, known, rest)})]
    return min(found, key=lambda one: one.high - one.low)


def _power(y: Floats, f: Floats, known: Sequence[int], rest: Sequence[int]) -> float:
    """Return how much the predictions count for: the λ that makes the estimate's variance least, within [0, 1]."""
    spread = float(f.var(ddof=1)) if len(f) > 1 else 0.0
    if not rest or len(known) < 2 or not spread:
        return 0.0
    covariance = float(np.cov(y, f[known])[0, 1])
    return min(max(covariance / ((1 + len(known) / len(rest)) * spread), 0.0), 1.0)


def _shuffled(draws: Floats) -> Floats:
    """Return draws in another order: those of two means come from one seed, and must not rise and fall together."""
    return np.random.default_rng(1).permutation(draws)
