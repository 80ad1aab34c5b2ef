"""Intervals and paired tests that do not collapse: exact or score methods for 0/1 values, resampling for others.

Everything is deterministic: resampling draws from a generator with a fixed seed, so equal data gives equal numbers.
"""

from collections.abc import Callable, Hashable, Sequence
from math import sqrt
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ..contracts.metrics import Metric

Test = Literal["superiority", "non_inferiority"]
Floats = NDArray[np.float64]

RESAMPLES = 10_000
POWER = 0.8
"""Chance to decide that `required_n` aims at."""


class Interval(BaseModel):
    """An estimate with its interval."""

    model_config = ConfigDict(frozen=True)

    mean: float
    low: float
    high: float
    n: int
    """Examples it rests on."""


class PairedResult(BaseModel):
    """A candidate against a reference on the same examples; positive means that the candidate is better."""

    model_config = ConfigDict(frozen=True)

    candidate: float
    reference: float
    difference: Interval
    """Two-sided at level 1 − 2α, so that its low end decides as the one-sided test at α does."""
    p_value: float
    """One-sided, against "not better" (superiority) or "worse by the margin or more" (non-inferiority)."""
    passed: bool | None
    """True: shown. False: the opposite is shown. None: the data say neither."""
    needed: int | None
    """Examples in all that would decide with a power of 0.8 at the observed effect; None when passed or hopeless."""


class Counts(NamedTuple):
    """Paired 0/1 outcomes: `gained` where the candidate alone is right, `lost` where the reference alone is."""

    gained: int
    lost: int
    n: int


# --- one sample -----------------------------------------------------------------------------------------------------


def proportion(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval of a proportion (Wilson 1927): sensible at 0, at 1, and at n = 10.

    Args:
        successes: May be a fraction, for a bounded mean treated as a proportion.
        n: Trials; at least 1.
        confidence: Two-sided.
    """
    z = _z((1 + confidence) / 2)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = middle - half, middle + half
    # At 0 and 1 an end of the interval is that value itself; rounding would leave it a hair beside.
    return Interval(mean=share, low=low if successes > 0 else 0.0, high=high if successes < n else 1.0, n=n)


def mean_interval(
    values: Sequence[float],
    confidence: float = 0.95,
    *,
    clusters: Sequence[Hashable] | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> Interval:
    """Return the mean with an interval: Wilson's for 0/1 values, a percentile bootstrap (by cluster) for others.

    Where all values are equal a bootstrap would say "no doubt"; there the interval is Wilson's on the scaled mean.

    Args:
        values: At least one.
        confidence: Two-sided.
        clusters: Key of each value; values of one key are resampled together.
        low: Smallest possible value.
        high: Largest possible value.
    """
    data = np.asarray(values, dtype=np.float64)
    sums, sizes = _by_cluster(data, clusters)
    if len(sums) == len(data) and _is_binary(data):
        return proportion(float(data.sum()), len(data), confidence)
    if len(sums) < 2 or float(np.ptp(sums / sizes)) == 0.0:
        scaled = proportion((float(data.mean()) - low) / (high - low) * len(sums), len(sums), confidence)
        return Interval(
            mean=float(data.mean()),
            low=low + scaled.low * (high - low),
            high=low + scaled.high * (high - low),
            n=len(data),
        )
    ends = _bootstrap(sums, sizes, confidence)
    return Interval(mean=float(data.mean()), low=ends[0], high=ends[1], n=len(data))


def summarise(values: Sequence[float], metric: Metric, confidence: float = 0.95) -> Interval:
    """Return mean and interval of a metric's values, within the metric's range."""
    return mean_interval(values, confidence, low=metric.low, high=metric.high)


# --- two arms on the same examples ----------------------------------------------------------------------------------


def paired_difference(
    new: Sequence[float],
    old: Sequence[float],
    confidence: float = 0.95,
    *,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Return the mean difference new − old with its interval: Tango's for 0/1 pairs, a bootstrap for others.

    Args:
        new: Values of one arm.
        old: Values of the other on the same examples.
        confidence: Two-sided.
        clusters: Key of each example; examples of one key count as one draw.
    """
    a, b = np.asarray(new, dtype=np.float64), np.asarray(old, dtype=np.float64)
    sums, sizes = _by_cluster(a - b, clusters)
    mean = float((a - b).mean())
    if len(sums) == len(a) and _is_binary(a) and _is_binary(b):
        ends = tango(_counts(a, b), confidence)
    elif len(sums) < 2 or float(np.ptp(sums / sizes)) == 0.0:
        ends = tango(Counts(0, 0, len(sums)), confidence)  # no two draws differ: doubt as if none were discordant
        ends = (min(ends[0], mean), max(ends[1], mean))
    else:
        ends = _bootstrap(sums, sizes, confidence)
    return Interval(mean=mean, low=ends[0], high=ends[1], n=len(a))


def paired_test(
    candidate: Sequence[float | None],
    reference: Sequence[float | None],
    *,
    better: Literal["higher", "lower"],
    test: Test = "superiority",
    margin: float = 0.0,
    alpha: float = 0.05,
    clusters: Sequence[Hashable] | None = None,
) -> PairedResult:
    """Compare two arms on the same examples; where a metric applies to neither or one of them, the example is left out.

    0/1 pairs: exact McNemar for superiority, Tango's score test for non-inferiority. Others, and examples that share a
    cluster: a sign-flip permutation test of the cluster sums, shifted by the margin.

    Args:
        candidate: Values of the candidate; None where the metric does not apply.
        reference: Values of the reference on the same examples.
        better: Which way is better.
        test: What is to be shown.
        margin: For non-inferiority, in the metric's unit.
        alpha: One-sided level.
        clusters: Key of each example.
    """
    kept = [i for i, pair in enumerate(zip(candidate, reference, strict=True)) if None not in pair]
    if not kept:
        nothing = Interval(mean=0.0, low=-1.0, high=1.0, n=0)
        return PairedResult(candidate=0, reference=0, difference=nothing, p_value=1.0, passed=None, needed=None)
    raw = [np.asarray([side[i] for i in kept], dtype=np.float64) for side in (candidate, reference)]
    a, b = raw if better == "higher" else [1.0 - side for side in raw]
    keys = [clusters[i] for i in kept] if clusters is not None else None
    shift = margin if test == "non_inferiority" else 0.0
    difference = paired_difference(a.tolist(), b.tolist(), 1 - 2 * alpha, clusters=keys)
    sums, sizes = _by_cluster(a - b, keys)
    if len(sums) == len(a) and _is_binary(a) and _is_binary(b):
        counts = _counts(a, b)
        p_value = mcnemar(counts) if test == "superiority" else 1 - _cdf(tango_z(counts, -shift))
    else:
        p_value = _sign_flip(sums + shift * sizes)
    passed = True if p_value <= alpha else False if difference.high <= -shift else None
    return PairedResult(
        candidate=float(raw[0].mean()),
        reference=float(raw[1].mean()),
        difference=difference,
        p_value=p_value,
        passed=passed,
        needed=required_n(sums / sizes, shift, alpha, len(a)) if passed is None else None,
    )


def mcnemar(counts: Counts) -> float:
    """Return the one-sided p-value of McNemar's exact test: chance of so many gains among the discordant pairs."""
    from scipy.stats import binom

    discordant = counts.gained + counts.lost
    return float(binom.sf(counts.gained - 1, discordant, 0.5)) if discordant else 1.0


def tango_z(counts: Counts, delta: float) -> float:
    """Return Tango's score statistic for a true difference `delta` of paired proportions (Tango 1998)."""
    b, c, n = counts
    linear = -b - c + (2 * n - b + c) * delta
    constant = -c * delta * (1 - delta)
    q = (sqrt(max(linear * linear - 8 * n * constant, 0.0)) - linear) / (4 * n)
    variance = n * (2 * q + delta * (1 - delta))
    if variance <= 0:
        return 0.0 if b - c == n * delta else float("inf") * (1 if b - c > n * delta else -1)
    return (b - c - n * delta) / sqrt(variance)


def tango(counts: Counts, confidence: float = 0.95) -> tuple[float, float]:
    """Return Tango's score interval of a difference of paired proportions; it has a width at zero discordance too."""
    z = _z((1 + confidence) / 2)
    estimate = (counts.gained - counts.lost) / counts.n
    low = _bisect(lambda delta: tango_z(counts, delta) - z, -1.0, estimate)
    high = _bisect(lambda delta: tango_z(counts, delta) + z, estimate, 1.0)
    return low, high


def required_n(differences: Floats, shift: float, alpha: float, n: int) -> int | None:
    """Return how many examples in all would decide, by the normal approximation at the observed effect and variance.

    Args:
        differences: Per example or cluster, positive where the candidate is better.
        shift: Margin of non-inferiority; 0 for superiority.
        alpha: One-sided level.
        n: Examples there are.

    Returns:
        At least one more than there are; None when the observed effect points the other way.
    """
    effect = float(differences.mean()) + shift
    if effect <= 0:
        return None
    variance = max(float(differences.var(ddof=1)) if len(differences) > 1 else 0.0, 1.0 / len(differences))
    wanted = variance * (_z(1 - alpha) + _z(POWER)) ** 2 / effect**2
    return max(n + 1, int(np.ceil(wanted * n / len(differences))))


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Return which hypotheses Holm's step-down procedure rejects at a family-wise level (Holm 1979)."""
    rejected = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > alpha / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


# --- parts ----------------------------------------------------------------------------------------------------------


def _z(probability: float) -> float:
    return NormalDist().inv_cdf(probability)


def _cdf(value: float) -> float:
    return NormalDist().cdf(value) if np.isfinite(value) else float(value > 0)


def _is_binary(values: Floats) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _counts(candidate: Floats, reference: Floats) -> Counts:
    return Counts(int((candidate > reference).sum()), int((candidate < reference).sum()), len(candidate))


def _by_cluster(values: Floats, clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Return sum and size of each cluster; each value is its own where no keys are given."""
    if clusters is None or len(set(clusters)) == len(values):
        return values, np.ones(len(values))
    order = {key: place for place, key in enumerate(dict.fromkeys(clusters))}
    places = np.asarray([order[key] for key in clusters])
    return np.bincount(places, weights=values).astype(np.float64), np.bincount(places).astype(np.float64)


def _bootstrap(sums: Floats, sizes: Floats, confidence: float) -> tuple[float, float]:
    draws = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 500):  # in blocks: 500 × clusters indices at a time
        picked = draws.integers(0, len(sums), (500, len(sums)))
        means[start : start + 500] = sums[picked].sum(1) / sizes[picked].sum(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _sign_flip(sums: Floats) -> float:
    """Return the one-sided p-value of a sum of signed values, each sign as likely as the other."""
    observed = float(sums.sum())
    draws, exceeded = np.random.default_rng(0), 0
    for _ in range(0, RESAMPLES, 500):
        signs = draws.integers(0, 2, (500, len(sums))) * 2.0 - 1.0
        exceeded += int((signs @ sums >= observed - 1e-12).sum())
    return (exceeded + 1) / (RESAMPLES + 1)


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a falling function crosses zero."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2
