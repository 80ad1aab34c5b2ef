"""How often the gate is wrong, by simulation: `python tests/benchmarks/gate_error_rates.py [repetitions]`.

Table 1 puts the gate's test beside rules that are published and in use. Table 2 puts every kind of test where its
claim is only just false: a rate above α there, beyond the noise of the simulation, is a defect, and the script exits 1.
"""

import sys
from collections.abc import Callable
from functools import partial
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.components.shared.statistics import paired_test

ALPHA = 0.05
MARGIN = 0.05
Floats = NDArray[np.float64]
Arms = tuple[Floats, Floats, list[int] | None]
"""Candidate, reference, cluster of each example."""


def flips(rng: np.random.Generator, n: int, delta: float, flipped: float = 0.2, accuracy: float = 0.6) -> Arms:
    """Draw 0/1 outcomes: the reference is right with `accuracy`, and a share `flipped` of examples turns."""
    right, draw = rng.random(n) < accuracy, rng.random(n)
    lost = right & (draw < (flipped - delta) / 2 / accuracy)
    gained = ~right & (draw < (flipped + delta) / 2 / (1 - accuracy))
    return ((right & ~lost) | gained).astype(float), right.astype(float), None


def clustered(rng: np.random.Generator, n: int, delta: float, size: int = 5, flipped: float = 0.2) -> Arms:
    """Draw 0/1 outcomes that are the same within a cluster of `size` rows."""
    candidate, reference, _ = flips(rng, n // size, delta, flipped)
    return candidate.repeat(size), reference.repeat(size), np.arange(n // size).repeat(size).tolist()


def repeated(rng: np.random.Generator, n: int, delta: float, flipped: float = 0.2) -> Arms:
    """Draw independent 0/1 outcomes of which just two share a cluster: nearly the exact case, by the other way."""
    candidate, reference, _ = flips(rng, n, delta, flipped)
    return candidate, reference, [0, *range(n - 1)]


def shares(rng: np.random.Generator, n: int, delta: float) -> Arms:
    """Draw shares of right fields, in eighths, the candidate's shifted by `delta`."""
    reference = rng.binomial(8, 0.7, n) / 8
    candidate = np.where(rng.random(n) < 0.5, reference, rng.binomial(8, 0.7 + 2 * delta, n) / 8)
    # Where the reference is kept the mean is its own, so the other half carries all of the shift.
    return candidate, reference, None


def breaks(rng: np.random.Generator, n: int, delta: float) -> Arms:
    """Draw shares of which a few collapse to 0: the skewed way in which a model really gets worse (delta < 0)."""
    reference = np.full(n, 0.9)
    return np.where(rng.random(n) < -delta / 0.9, 0.0, reference), reference, None


def rules(candidate: Floats, reference: Floats) -> dict[str, bool]:
    """Return what each rule says of one experiment."""
    d, n = candidate - reference, len(candidate)
    mean, error = float(d.mean()), float(d.std(ddof=1)) / sqrt(n)
    unpaired = sqrt(candidate.var(ddof=1) / n + reference.var(ddof=1) / n)
    return {
        "point ≥": mean >= 0,
        "point >": mean > 0,
        "interval, drop ≤ 1 pp": mean - 1.96 * error >= -0.01,
        "unpaired 1.96 SE": mean > 1.96 * unpaired,
        "this gate": promoted((candidate, reference, None)),
    }


def promoted(arms: Arms, **test: Any) -> bool:
    """Return whether the gate's test passes."""
    candidate, reference, clusters = arms
    return bool(
        paired_test(
            candidate.tolist(), reference.tolist(), better="higher", alpha=ALPHA, clusters=clusters, **test
        ).passed
    )


def compare_rules(repetitions: int) -> None:
    """Print how often each rule promotes a model that is worse, equal or better."""
    rng = np.random.default_rng(0)
    names = list(rules(np.array([1.0, 0.0]), np.array([0.0, 0.0])))
    print("Share promoted; accuracy of the reference 0.60, 20 % of the examples flip")
    print(f"{'n':>5} {'true Δ':>7}  " + "  ".join(names))
    for n in (50, 200, 1000):
        for delta in (-0.05, 0.0, 0.05):
            total = dict.fromkeys(names, 0)
            for _ in range(repetitions):
                for name, says in rules(*flips(rng, n, delta)[:2]).items():
                    total[name] += says
            cells = "  ".join(f"{total[name] / repetitions:>{len(name)}.3f}" for name in names)
            print(f"{n:>5} {100 * delta:>+4.0f} pp  {cells}", flush=True)


def boundaries() -> list[tuple[str, int, Callable[..., Arms], dict[str, Any]]]:
    """Return every kind of test, drawn where its claim is only just false."""
    better, no_worse = {"test": "superiority"}, {"test": "non_inferiority", "margin": MARGIN}
    rows: list[tuple[str, int, Callable[..., Arms], dict[str, Any]]] = []
    for n in (50, 200, 500):
        rows += [
            ("0/1, better", n, partial(flips, delta=0.0), better),
            ("0/1, better, few flips", n, partial(flips, delta=0.0, flipped=0.03), better),
            ("0/1, no worse", n, partial(flips, delta=-MARGIN), no_worse),
            ("0/1, no worse, only losses", n, partial(flips, delta=-MARGIN, flipped=MARGIN), no_worse),
            ("shares, better", n, partial(shares, delta=0.0), better),
            ("shares, no worse", n, partial(shares, delta=-MARGIN), no_worse),
            ("shares, no worse, a few break", n, partial(breaks, delta=-MARGIN), no_worse),
            ("clusters, better", 5 * n, partial(clustered, delta=0.0), better),
            ("clusters, no worse", 5 * n, partial(clustered, delta=-MARGIN), no_worse),
            ("clusters, no worse, only losses", 5 * n, partial(clustered, delta=-MARGIN, flipped=MARGIN), no_worse),
            ("two rows share a cluster, no worse", n, partial(repeated, delta=-MARGIN), no_worse),
        ]
    return rows


def check_boundaries(repetitions: int) -> bool:
    """Print the rate of false passes of every kind of test, and return whether all keep to α."""
    limit = ALPHA + 3 * sqrt(ALPHA * (1 - ALPHA) / repetitions)
    print(f"\nFalse passes where the claim is only just false; α = {ALPHA}, limit with noise {limit:.3f}")
    kept = True
    for name, n, draw, test in boundaries():
        rng = np.random.default_rng(1)
        rate = sum(promoted(draw(rng, n), **test) for _ in range(repetitions)) / repetitions
        kept &= rate <= limit
        print(f"{name:<36} n = {n:>4}  {rate:.3f}{'' if rate <= limit else '  ABOVE'}", flush=True)
    return kept


def main() -> int:
    """Print both tables."""
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    compare_rules(repetitions)
    return 0 if check_boundaries(repetitions) else 1


if __name__ == "__main__":
    sys.exit(main())
