"""Intervals and paired tests that do not collapse.

* 0/1 values, each its own draw: Wilson's interval, McNemar's exact test, Tango's score test, and against a fixed bound
  Clopper and Pearson's.
* All others (shares, ratings, rows that share a cluster): Gaffke's bound on a bounded mean, see `gaffke_draws`.
  On −1/0/+1 differences it is McNemar's exact test and on 0/1 values Clopper and Pearson's bound; a bootstrap or a
  sign-flip test promotes too often where a few examples lose much (`tests/benchmarks/gate_error_rates.py`).

Everything is deterministic: resampling draws from a generator with a fixed seed, so equal data gives equal numbers, in
whatever order.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from math import ceil, log, sqrt
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ..contracts.metrics import Metric

Test = Literal["superiority", "non_inferiority"]
Floats = NDArray[np.float64]
Values = Sequence[float | None] | Floats
"""One per example; None or NaN where a metric does not apply."""

RESAMPLES = 10_000
MOST_RESAMPLES = 200_000
DRAWS_BEYOND = 50
"""Draws that a quantile wants beyond it: at a smaller level there are more of them, up to `MOST_RESAMPLES`."""
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


class Tested(BaseModel):
    """A candidate against a reference on the same examples, or against a bound; positive: the candidate is better."""

    model_config = ConfigDict(frozen=True)

    candidate: float
    reference: float
    """The bound, where it is that which was tested."""
    difference: Interval
    """Two-sided at level 1 − 2α, so that its low end decides as the one-sided test at α does."""
    p_value: float
    """One-sided, against "not better, by the margin" (superiority), "worse by the margin" (non-inferiority), or "not on
    the right side of the bound"."""
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
    """Return the mean with an interval: Wilson's for 0/1 values, Gaffke's (by cluster) for others.

    Args:
        values: At least one.
        confidence: Two-sided.
        clusters: Key of each value; values of one key count as one draw.
        low: Smallest possible value.
        high: Largest possible value.
    """
    data = np.asarray(values, dtype=np.float64)
    sums, sizes = by_cluster(data, clusters)
    if len(sums) == len(data) and _is_binary(low, high, data):
        return proportion(float(data.sum()), len(data), confidence)
    ends = _gaffke(sums, sizes, confidence, low, high)
    return Interval(mean=float(data.mean()), low=ends[0], high=ends[1], n=len(data))


def summarise(values: Sequence[float], metric: Metric, confidence: float = 0.95) -> Interval:
    """Return mean and interval of a metric's values, within the metric's range."""
    return mean_interval(values, confidence, low=metric.low, high=metric.high)


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a proportion: what the binomial tests do not reject (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, n - successes + 1)) if successes else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, n - successes)) if successes < n else 1.0
    return low, high


def bound_test(
    values: Values,
    bound: float,
    *,
    better: Literal["higher", "lower"],
    alpha: float = 0.05,
    clusters: Sequence[Hashable] | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> Tested:
    """Test whether a mean is on the right side of a bound: below a ceiling or above a floor, as the metric points.

    0/1 values: the exact binomial test, of which Clopper and Pearson's interval is the inversion. Others, and examples
    that share a cluster: Gaffke's bound.

    Args:
        values: Of the candidate.
        bound: A ceiling where lower is better, else a floor; in the metric's unit.
        better: Which way is better.
        alpha: One-sided level.
        clusters: Key of each example.
        low: Smallest possible value of the metric.
        high: Largest possible value of the metric.
    """
    given = np.asarray(values, dtype=np.float64)
    kept = np.flatnonzero(~np.isnan(given))
    if not len(kept):
        return _nothing(bound, low - high, high - low)
    raw = given[kept]
    turned, bar = (raw, bound) if better == "higher" else (low + high - raw, low + high - bound)
    sums, sizes = by_cluster(turned, _keys(clusters, kept))
    if len(sums) == len(turned) and _is_binary(low, high, turned):
        from scipy.stats import binom

        right = int(turned.sum())
        p_value = float(binom.sf(right - 1, len(turned), bar))
        ends = clopper_pearson(right, len(turned), 1 - 2 * alpha)
    else:
        p_value = share_of_draws(gaffke_draws(sums, sizes, low, alpha) <= bar)
        ends = _gaffke(sums, sizes, 1 - 2 * alpha, low, high)
    gain = Interval(mean=float(turned.mean()) - bar, low=ends[0] - bar, high=ends[1] - bar, n=len(turned))
    passed = _answer(p_value, alpha, gain, 0.0)
    return Tested(
        candidate=float(raw.mean()),
        reference=bound,
        difference=gain,
        p_value=p_value,
        passed=passed,
        needed=required_n(sums / sizes, bar, alpha, len(turned)) if passed is None else None,
    )


# --- two arms on the same examples ----------------------------------------------------------------------------------


def paired_difference(
    new: Sequence[float] | Floats,
    old: Sequence[float] | Floats,
    confidence: float = 0.95,
    *,
    clusters: Sequence[Hashable] | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> Interval:
    """Return the mean difference new − old with its interval: Tango's for 0/1 pairs, Gaffke's for others.

    Args:
        new: Values of one arm.
        old: Values of the other on the same examples.
        confidence: Two-sided.
        clusters: Key of each example; examples of one key count as one draw.
        low: Smallest possible value of either arm.
        high: Largest possible value of either arm.
    """
    a, b = np.asarray(new, dtype=np.float64), np.asarray(old, dtype=np.float64)
    sums, sizes = by_cluster(a - b, clusters)
    if len(sums) == len(a) and _is_binary(low, high, a, b):
        ends = tango(_counts(a, b), confidence)
    else:
        ends = _gaffke(sums, sizes, confidence, low - high, high - low)
    return Interval(mean=float((a - b).mean()), low=ends[0], high=ends[1], n=len(a))


def paired_test(
    candidate: Values,
    reference: Values,
    *,
    better: Literal["higher", "lower"],
    test: Test = "superiority",
    margin: float = 0.0,
    alpha: float = 0.05,
    clusters: Sequence[Hashable] | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> Tested:
    """Compare two arms on the same examples; where a metric applies to neither or one of them, the example is left out.

    0/1 pairs: exact McNemar for superiority, Tango's score test wherever there is a margin. Others, and examples that
    share a cluster: Gaffke's bound, whose p-value and interval are one.

    Args:
        candidate: Values of the candidate.
        reference: Values of the reference on the same examples.
        better: Which way is better.
        test: What is to be shown.
        margin: In the metric's unit: for non-inferiority the loss that is acceptable, for superiority the least gain.
        alpha: One-sided level.
        clusters: Key of each example.
        low: Smallest possible value of the metric.
        high: Largest possible value of the metric.
    """
    given = [np.asarray(side, dtype=np.float64) for side in (candidate, reference)]
    kept = np.flatnonzero(~np.isnan(given[0] + given[1]))
    if not len(kept):
        return _nothing(0.0, low - high, high - low)
    raw = [side[kept] for side in given]
    a, b = raw if better == "higher" else [low + high - side for side in raw]
    keys = _keys(clusters, kept)
    bar = -margin if test == "non_inferiority" else margin
    difference = paired_difference(a, b, 1 - 2 * alpha, clusters=keys, low=low, high=high)
    sums, sizes = by_cluster(a - b, keys)
    if len(sums) == len(a) and _is_binary(low, high, a, b):
        counts = _counts(a, b)
        exact = test == "superiority" and bar == 0
        p_value = mcnemar(counts) if exact else _cdf(-tango_z(counts, bar))
    else:
        p_value = share_of_draws(gaffke_draws(sums, sizes, low - high, alpha) <= bar)
    passed = _answer(p_value, alpha, difference, bar)
    return Tested(
        candidate=float(raw[0].mean()),
        reference=float(raw[1].mean()),
        difference=difference,
        p_value=p_value,
        passed=passed,
        needed=required_n(sums / sizes, bar, alpha, len(a)) if passed is None else None,
    )


@lru_cache(maxsize=1 << 16)
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


@lru_cache(maxsize=1 << 16)
def tango(counts: Counts, confidence: float = 0.95) -> tuple[float, float]:
    """Return Tango's score interval of a difference of paired proportions; it has a width at zero discordance too."""
    z = _z((1 + confidence) / 2)
    estimate = (counts.gained - counts.lost) / counts.n
    low = _bisect(lambda delta: tango_z(counts, delta) - z, -1.0, estimate)
    high = _bisect(lambda delta: tango_z(counts, delta) + z, estimate, 1.0)
    return low, high


def required_n(differences: Floats, bar: float, alpha: float, n: int) -> int | None:
    """Return how many examples in all would pass, by the normal approximation at the observed effect and variance.

    Args:
        differences: Per example or cluster, positive where the candidate is better.
        bar: What the mean difference has to exceed: 0, the least gain, or the acceptable loss below 0.
        alpha: One-sided level.
        n: Examples there are.

    Returns:
        At least one more than there are; None when the observed effect does not exceed the bar, so that more examples
        of this kind would not help.
    """
    effect = float(differences.mean()) - bar
    if effect <= 0:
        return None
    variance = max(float(differences.var(ddof=1)) if len(differences) > 1 else 0.0, 1.0 / len(differences))
    wanted = variance * (_z(1 - alpha) + _z(POWER)) ** 2 / effect**2
    return max(n + 1, ceil(wanted * n / len(differences)))


def examples_to_show(gain: float, alpha: float, discordant: float = 0.2) -> int:
    """Return how many paired 0/1 examples show a true gain, before anything was measured.

    Args:
        gain: Difference of the shares; above 0.
        alpha: One-sided level.
        discordant: Share of examples on which one arm alone is right; at least the gain itself.
    """
    variance = max(discordant, gain) - gain**2
    exact = ceil(log(alpha) / log(0.5))  # fewer discordant pairs than this and McNemar's test cannot reach the level
    return max(exact, ceil(variance * (_z(1 - alpha) + _z(POWER)) ** 2 / gain**2))


def examples_to_tell(share: float, bar: float, alpha: float) -> int | None:
    """Return how many 0/1 examples tell on which side of a bar a true share lies; None where it lies on the bar."""
    if abs(share - bar) < 1e-9:
        return None
    variance = max(share * (1 - share), bar * (1 - bar))
    return ceil(variance * (_z(1 - alpha) + _z(POWER)) ** 2 / (share - bar) ** 2)


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


def _nothing(reference: float, low: float, high: float) -> Tested:
    """Return the answer of a test that has no example."""
    empty = Interval(mean=0.0, low=low, high=high, n=0)
    return Tested(candidate=0, reference=reference, difference=empty, p_value=1.0, passed=None, needed=None)


def _answer(p_value: float, alpha: float, gain: Interval, bar: float) -> bool | None:
    return True if p_value <= alpha else False if gain.high <= bar else None


def _keys(clusters: Sequence[Hashable] | None, kept: NDArray[np.intp]) -> list[Hashable] | None:
    return None if clusters is None else [clusters[i] for i in kept]


def _is_binary(low: float, high: float, *sides: Floats) -> bool:
    """Return whether the values are all 0 or 1 and could be nothing beyond: a rating of 0 to 5 could."""
    return (low, high) == (0, 1) and all(bool(((side == 0) | (side == 1)).all()) for side in sides)


def _counts(candidate: Floats, reference: Floats) -> Counts:
    return Counts(int((candidate > reference).sum()), int((candidate < reference).sum()), len(candidate))


def by_cluster(values: Floats, clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Return sum and size of each cluster; each value is its own where no keys are given."""
    if clusters is None or len(set(clusters)) == len(values):
        return values, np.ones(len(values))
    order = {key: place for place, key in enumerate(dict.fromkeys(clusters))}
    places = np.asarray([order[key] for key in clusters])
    return np.bincount(places, weights=values).astype(np.float64), np.bincount(places).astype(np.float64)


def _gaffke(sums: Floats, sizes: Floats, confidence: float, worst: float, best: float) -> tuple[float, float]:
    """Return both ends of the interval of a mean that lies between `worst` and `best`."""
    tail = (1 - confidence) / 2
    return (
        float(np.quantile(gaffke_draws(sums, sizes, worst, tail), tail)),
        float(np.quantile(gaffke_draws(sums, sizes, best, tail), 1 - tail)),
    )


def gaffke_draws(sums: Floats, sizes: Floats, extreme: float, tail: float) -> Floats:
    """Return draws of the mean, enough of them for a quantile at `tail`, under Gaffke's bound.

    Gaffke 2005; Learned-Miller and Thomas 2020, arXiv:1905.06208.

    The sample is joined by one more cluster of mean size at the extreme, for all that was not seen, and is weighted by
    exponential draws. So a sample without variance leaves doubt too: the chance that a share q of cases lies at the
    extreme and none of n was seen is (1 − q)^n. That the bound holds its level for every bounded distribution is proven
    in special cases and conjectured in general; it holds in all of our simulations. Clusters of unequal size make the
    mean a ratio, for which it is an approximation.
    """
    size = float(sizes.mean())
    table = np.column_stack([np.append(sums, extreme * size), np.append(sizes, size)])
    distinct, counts = np.unique(table, axis=0, return_counts=True)  # the weights of equal clusters add up to one gamma
    generator, means = np.random.default_rng(0), []
    wanted = min(max(RESAMPLES, ceil(DRAWS_BEYOND / tail)), MOST_RESAMPLES)
    for _ in range(0, wanted, 500):  # in blocks: 500 × distinct clusters at a time
        weights = generator.standard_gamma(counts.astype(np.float64), (500, len(distinct)))
        means.append((weights @ distinct[:, 0]) / (weights @ distinct[:, 1]))
    return np.concatenate(means)


def share_of_draws(hits: NDArray[np.bool_]) -> float:
    """Return a p-value from draws; never 0, for the next draw might have hit."""
    return (int(hits.sum()) + 1) / (len(hits) + 1)


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a falling function crosses zero."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2
