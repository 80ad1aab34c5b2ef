"""Does an answer's confidence mean what it says? Brier's score of an example, the calibration error of a table.

The confidence of an answer is the probability that the model gives to it: of a classifier that of the label, of a
language model the product of the probabilities of the answer's tokens, its end among them. A language model may also
say something that is no label; that probability counts as doubt. "Right" is the task's primary metric.

A task that lists these metrics gets them: they are no function of the text, so its `score` does not give them.
"""

from collections.abc import Sequence

import numpy as np

from ..contracts.metrics import Metric
from ..contracts.rows import Result
from .statistics import Interval

CONFIDENCE = "confidence"
"""Name of the confidence among a result's scores."""
BINS = 10
RESAMPLES = 1000

BRIER = Metric(
    name="brier",
    title="Brier score",
    better="lower",
    unit="points",
    definition="Squared distance of the answer's confidence from 1 if it is right and from 0 if not (Brier 1950).",
)
ECE = Metric(
    name="ece",
    title="Calibration error",
    better="lower",
    unit="points",
    definition=f"Distance of confidence from share right, over {BINS} equal bins of confidence weighted by their "
    "examples (Guo et al. 2017). Of a table, not of an example.",
)


def confidence_scores(confidence: float, right: float) -> dict[str, float]:
    """Return what one answer's confidence adds to its scores."""
    return {CONFIDENCE: confidence, BRIER.name: (confidence - right) ** 2}


def calibration_error(results: Sequence[Result], primary: str, level: float) -> Interval | None:
    """Return the expected calibration error of some results, or None where none has a confidence.

    The interval is the bootstrap's (percentiles of resampled examples), widened where the estimate would lie outside:
    the error of few examples is too high, and that of their resamples more so.

    Args:
        results: Of one arm.
        primary: The metric that says what is right, 0 or 1.
        level: Of the interval, two-sided.
    """
    known = [row.scores for row in results if row.scores.get(CONFIDENCE) is not None]
    if not known:
        return None
    confidence = np.array([scores[CONFIDENCE] for scores in known], dtype=np.float64)
    gap = confidence - np.array([scores[primary] for scores in known], dtype=np.float64)
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    n = len(gap)
    # |sum of the gaps of a bin| / n is the bin's weight times the distance of its means.
    drawn = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    places = bins[drawn] + BINS * np.arange(RESAMPLES)[:, None]
    sums = np.bincount(places.ravel(), gap[drawn].ravel(), RESAMPLES * BINS).reshape(RESAMPLES, BINS)
    low, high = np.quantile(np.abs(sums).sum(1) / n, [(1 - level) / 2, (1 + level) / 2])
    error = float(np.abs(np.bincount(bins, gap, BINS)).sum() / n)
    return Interval(mean=error, low=min(float(low), error), high=max(float(high), error), n=n)
