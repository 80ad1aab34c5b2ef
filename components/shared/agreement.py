"""How far raters agree beyond what chance would give: Cohen's kappa for two, Krippendorff's alpha for any number."""

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np

from .statistics import RESAMPLES, Floats, Interval

Level = Literal["nominal", "ordinal", "interval"]


def cohens_kappa(
    one: Sequence[Hashable],
    other: Sequence[Hashable],
    categories: Sequence[Hashable],
    confidence: float = 0.95,
    *,
    weights: Literal["equal", "quadratic"] = "equal",
) -> Interval | None:
    """Return the agreement of two raters beyond chance (Cohen 1960); 1 is full, 0 what their habits alone would give.

    The interval is of the kappas of tables drawn from a Dirichlet posterior, whose prior is one observation spread over
    all cells (Perks 1947): unlike the normal one (Fleiss, Cohen and Everitt 1969), to which it tends, it has a width
    where ten of ten agree.

    Args:
        one: What one rater says of each item.
        other: What the other says of the same items.
        categories: All that they can say; in order, for quadratic weights.
        confidence: Two-sided.
        weights: Whether all disagreements weigh the same, or as the square of their distance (Cohen 1968).

    Returns:
        None where there is no item, or both raters only ever say the same one thing: chance then explains all.
    """
    size = len(categories)
    places = {category: place for place, category in enumerate(categories)}
    table = np.zeros((size, size))
    for left, right in zip(one, other, strict=True):
        table[places[left], places[right]] += 1
    distance = np.subtract.outer(np.arange(size), np.arange(size)).astype(np.float64) ** 2
    costs = distance if weights == "quadratic" else (distance > 0).astype(np.float64)
    if not table.any() or not np.einsum("i,j,ij", table.sum(1), table.sum(0), costs):
        return None
    posterior = (table + 1 / table.size).ravel()
    drawn = np.random.default_rng(0).dirichlet(posterior, RESAMPLES).reshape(-1, size, size)
    mean = float(_kappa(table[None] / table.sum(), costs)[0])
    tail = (1 - confidence) / 2
    low, high = np.quantile(_kappa(drawn, costs), [tail, 1 - tail])
    return Interval(mean=mean, low=min(float(low), mean), high=max(float(high), mean), n=len(one))


def krippendorff_alpha(ratings: Sequence[Sequence[float | None]], level: Level = "ordinal") -> float | None:
    """Return the agreement of any number of raters, some of whom may not have rated some items (Krippendorff 2011).

    Args:
        ratings: Of each rater the values of all items; None where there is none.
        level: What a disagreement weighs: 1, the squared number of ranks between, or the squared difference.

    Returns:
        1 for full agreement, 0 for what chance gives, below 0 for less; None where no item was rated twice, or all
        ratings are one value.
    """
    items = [[value for value in item if value is not None] for item in zip(*ratings, strict=True)]
    items = [item for item in items if len(item) > 1]
    values = sorted({value for item in items for value in item})
    places = {value: place for place, value in enumerate(values)}
    observed = np.zeros((len(values), len(values)))  # the coincidence matrix
    for item in items:
        counts = np.bincount([places[value] for value in item], minlength=len(values)).astype(np.float64)
        observed += (np.outer(counts, counts) - np.diag(counts)) / (len(item) - 1)
    totals = observed.sum(1)
    expected = np.outer(totals, totals) - np.diag(totals)
    costs = _costs(np.asarray(values), totals, level)
    chance = float((expected * costs).sum())
    if not chance:
        return None
    return float(1 - (totals.sum() - 1) * (observed * costs).sum() / chance)


def _kappa(tables: Floats, costs: Floats) -> Floats:
    """Return the kappa of each table of shares: [tables, categories, categories] → [tables]."""
    chance = np.einsum("ti,tj,ij->t", tables.sum(2), tables.sum(1), costs)
    return np.asarray(1 - np.einsum("tij,ij->t", tables, costs) / chance)


def _costs(values: Floats, totals: Floats, level: Level) -> Floats:
    """Return what a disagreement of each two values weighs."""
    if level == "nominal":
        return 1 - np.eye(len(values))
    # A value's rank is the middle of its ties, so that two ranks differ by what lies between, and half of each end.
    scale = totals.cumsum() - totals / 2 if level == "ordinal" else values
    return np.asarray(np.subtract.outer(scale, scale) ** 2, dtype=np.float64)
