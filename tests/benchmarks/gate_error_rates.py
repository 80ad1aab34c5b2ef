"""How often the gate is wrong.

    python tests/benchmarks/gate_error_rates.py [--repetitions N] [--figure FILE.png] [--rates FILE.json]

`--rates components/write_report/error_rates.json` and `--figure components/gate/error_rates.png` renew what reports and
the gate's README show.

What is measured is the gate's own code (`findings_of` and `decide`). A decision on 0/1 outcomes of one metric depends
on how many examples were gained and lost, so equal counts are decided once. It exits 1 when a goal is missed:

1. One metric, one reference, beside rules that are published and in use, over n, effect and discordance. Goals: an
   unchanged model is promoted at a rate of at most α in every cell, one that is five points worse at 0.5 % at most by
   the default policy, and the power is that of McNemar's exact test at least, at the level that the gate has: α with
   `looks: 1`, and by default what the first decision may spend of it.
2. One to five correlated metrics. Goal: at most α, whichever of them fails.
3. Twenty retrains that change nothing against one held-out set. Goal: at most α over all of them.
4. Every kind of test where its claim is only just false. Goal: at most α.
5. Ten thousand whole decisions. Goal: a minute.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import binom

from assay.components.contracts.metrics import Metric
from assay.components.contracts.recipe import Criterion, GateSettings
from assay.components.gate.decide import Scores, Turn, decide, findings_of
from assay.components.shared.looks import level
from assay.components.shared.statistics import bound_test, paired_test

ALPHA, MARGIN, ACCURACY = 0.05, 0.05, 0.6
WORST = 0.005
"""Largest rate at which the default policy may promote a model that is five points worse."""
SIZES, EFFECTS, FLIPPED = (50, 100, 200, 500, 1000), (-0.05, -0.02, 0.0, 0.02, 0.05), (0.05, 0.1, 0.2, 0.4)
RETRAINS = 20
FIRST = level(ALPHA, 0, [])
"""Level of the first decision by default."""
PEERS = {"gate, looks: 1": "McNemar", "gate, default": "McNemar, spent"}
"""McNemar's exact test at the gate's own level; `spent` is what the first decision may spend of α."""
SHOWN = 0.2
"""Share of examples that flip, in figures and reports."""
Floats = NDArray[np.float64]
Hits = NDArray[np.bool_]
Arms = tuple[Floats, Floats, list[int] | None]
"""Candidate, reference, cluster of each example."""
METRICS = [Metric(name=f"m{k}", title=f"Metric {k}", better="higher", definition="") for k in range(1, 6)]


def policy(metrics: int, tier: Any = "primary") -> GateSettings:
    """Return a policy that wants so many metrics better than the champion."""
    criteria = [Criterion(metric=metric.name, tier=tier, versus=["champion"]) for metric in METRICS[:metrics]]
    return GateSettings(alpha=ALPHA, min_examples=1, criteria=criteria)


def promotes(candidate: list[Floats], champion: list[Floats], settings: GateSettings, at: float) -> bool:
    """Return whether the gate promotes, by its own code; one column per metric."""
    findings = findings_of(settings.model_copy(update={"alpha": at}), METRICS, columns(candidate, champion))
    digests = {"candidate": "c", "champion": "h", "baseline": "b"}
    return decide(settings, findings, digests, len(candidate[0]), METRICS, Turn(1, at)).decision == "promote"


def columns(candidate: list[Floats], champion: list[Floats]) -> Scores:
    """Return what the gate reads of two arms."""
    names = [metric.name for metric in METRICS]
    sides = {"candidate": candidate, "champion": champion}
    return Scores({arm: dict(zip(names, values, strict=False)) for arm, values in sides.items()})


ONE = policy(1)


@lru_cache(maxsize=1 << 20)
def gate(gained: int, lost: int, n: int, at: float) -> bool:
    """Return whether the gate promotes at a level, on 0/1 outcomes of which so many differ."""
    candidate, champion = np.zeros(n), np.zeros(n)
    candidate[:gained] = champion[gained : gained + lost] = 1
    return promotes([candidate], [champion], ONE, at)


# --- 1. one metric --------------------------------------------------------------------------------------------------


def draw_counts(rng: np.random.Generator, n: int, effect: float, flipped: float, size: int) -> NDArray[np.int64]:
    """Draw `size` experiments; returns (size, 3) counts of gained, lost and both right."""
    gained, lost = (flipped + effect) / 2, (flipped - effect) / 2
    both = ACCURACY - lost
    return rng.multinomial(n, [gained, lost, both, 1 - gained - lost - both], size)[:, :3]


def rules(counts: NDArray[np.int64], n: int) -> dict[str, Hits]:
    """Return what each rule says of each experiment."""
    gained, lost, both = counts.T
    mean = (gained - lost) / n
    error = np.sqrt(((gained + lost) / n - mean**2) / (n - 1))
    new, old = (gained + both) / n, (lost + both) / n
    unpaired = np.sqrt((new * (1 - new) + old * (1 - old)) / (n - 1))
    exact = binom.sf(gained - 1, gained + lost, 0.5)
    return {
        "point ≥": mean >= 0,
        "point >": mean > 0,
        "drop ≤ 1 pp": mean - 1.96 * error >= -0.01,
        "unpaired": mean > 1.96 * unpaired,
        "McNemar": exact <= ALPHA,
        "McNemar, spent": exact <= FIRST,
        "gate, looks: 1": decided(counts, n, ALPHA),
        "gate, default": decided(counts, n, FIRST),
    }


def decided(counts: NDArray[np.int64], n: int, at: float) -> Hits:
    """Return what the gate says of each experiment."""
    distinct, places = np.unique(counts[:, :2], axis=0, return_inverse=True)
    says = np.array([gate(int(gained), int(lost), n, at) for gained, lost in distinct])
    return says[places.reshape(-1)]


def compare_rules(repetitions: int) -> tuple[dict[tuple[int, float, float], dict[str, float]], list[str]]:
    """Print how often each rule promotes a model that is worse, equal or better; returns the rates and what missed."""
    rng, rates, missed = np.random.default_rng(0), {}, []
    print(f"1. Share promoted of {repetitions:,}; the reference is right in {ACCURACY:.0%}\n")
    for n in SIZES:
        for effect in EFFECTS:
            for flipped in FLIPPED:
                found = rules(draw_counts(rng, n, effect, flipped, repetitions), n)
                if not rates:
                    print(f"{'n':>5} {'effect':>7} {'flipped':>7}  " + "  ".join(found))
                rate = {name: float(hits.mean()) for name, hits in found.items()}
                rates[n, effect, flipped] = rate
                cells = "  ".join(f"{share:>{len(name)}.4f}" for name, share in rate.items())
                print(f"{n:>5} {100 * effect:>+4.0f} pp {flipped:>7.0%}  {cells}", flush=True)
                missed += goals(n, effect, flipped, rate, repetitions)
    return rates, missed


def goals(n: int, effect: float, flipped: float, rate: Mapping[str, float], repetitions: int) -> Iterator[str]:
    """Yield what a cell misses."""
    cell = f"n = {n}, {100 * effect:+.0f} pp, {flipped:.0%} flipped"
    if effect == 0:
        for name in PEERS:
            if rate[name] > noisy(ALPHA, repetitions):
                yield f"{name} promotes an unchanged model too often: {cell}: {rate[name]:.4f}"
    if effect == -0.05 and rate["gate, default"] > noisy(WORST, repetitions):
        yield f"the default promotes a worse model too often: {cell}: {rate['gate, default']:.4f}"
    for name, peer in PEERS.items():
        if effect > 0 and rate[name] < rate[peer]:
            yield f"{name} has less power than {peer}: {cell}: {rate[name]:.4f}, {rate[peer]:.4f}"


def noisy(rate: float, repetitions: int) -> float:
    """Return the largest share that a true rate explains, to three standard errors."""
    return rate + 3 * sqrt(rate * (1 - rate) / repetitions)


# --- 2. several metrics ---------------------------------------------------------------------------------------------


def correlated(rng: np.random.Generator, n: int, effects: list[float], flipped: float) -> tuple[list[Floats], ...]:
    """Draw 0/1 outcomes on metrics that agree: normal scores that share half of their variance."""

    def uniform() -> Iterator[Floats]:
        common = rng.normal(size=n)
        for _ in effects:
            yield ndtr((common + rng.normal(size=n)) / sqrt(2))

    pairs = [flip(u, v, effect, flipped) for effect, u, v in zip(effects, uniform(), uniform(), strict=True)]
    return [candidate for candidate, _ in pairs], [champion for _, champion in pairs]


def flip(u: Floats, v: Floats, effect: float, flipped: float) -> tuple[Floats, Floats]:
    """Return candidate and reference from two uniform draws: is the reference right, and does the example turn."""
    right = u < ACCURACY
    lost = right & (v < (flipped - effect) / 2 / ACCURACY)
    gained = ~right & (v < (flipped + effect) / 2 / (1 - ACCURACY))
    return ((right & ~lost) | gained).astype(float), right.astype(float)


def compare_metrics(repetitions: int) -> list[str]:
    """Print the rates of policies of one to five metrics, all of which must be better; returns what missed."""
    missed, n = [], 200
    print(f"\n2. One to five metrics, n = {n}, 20 % flipped, {repetitions:,} repetitions; all must be better")
    print("   any: at least one of them better at 5 % without a correction; Holm: the same, as supporting criteria\n")
    print("metrics  none better  any, uncorrected  any, Holm  one unchanged  one 5 worse  all 5 better  all 10 better")
    for m in range(1, 6):
        others = [0.15] * (m - 1)

        def share(effects: list[float], says: Callable[..., bool], seed: int = m) -> float:
            rng = np.random.default_rng(seed)
            return float(np.mean([says(*correlated(rng, n, effects, 0.2)) for _ in range(repetitions)]))

        gate = partial(promotes, settings=policy(m), at=ALPHA)
        none, unchanged, worse = (share(effects, gate) for effects in ([0.0] * m, [0.0, *others], [-0.05, *others]))
        five, ten = (share([effect] * m, gate) for effect in (0.05, 0.10))
        loose = share([0.0] * m, lambda new, old: any(passes((a, b, None)) for a, b in zip(new, old, strict=True)))
        holm = share([0.0] * m, partial(any_passes, settings=policy(m, "supporting")))
        print(
            f"{m:>7}  {none:>11.4f}  {loose:>16.4f}  {holm:>9.4f}  {unchanged:>13.4f}  {worse:>11.4f}  {five:>12.4f}  "
            f"{ten:>13.4f}",
            flush=True,
        )
        for name, share in (("none better", none), ("one unchanged", unchanged), ("any, Holm", holm)):
            if share > noisy(ALPHA, repetitions):
                missed.append(f"{m} metrics, {name}: {share:.4f}")
    return missed


def any_passes(candidate: list[Floats], champion: list[Floats], settings: GateSettings) -> bool:
    """Return whether a supporting criterion passes, by the gate's own correction."""
    return any(finding.passed for finding in findings_of(settings, METRICS, columns(candidate, champion)))


# --- 3. retrains ----------------------------------------------------------------------------------------------------


def spend(rule: str) -> Callable[[int], float]:
    """Return the level of the k-th look, from 0, while none promoted."""
    planned = {"gate, looks: 20": RETRAINS, "gate, default": 0}
    return lambda k: ALPHA if rule not in planned else level(ALPHA, planned[rule], [False] * k)


SPENT = ("gate, α each time", "gate, looks: 20", "gate, default")


def retrain(rng: np.random.Generator, n: int, effect: float, repetitions: int) -> NDArray[np.int64]:
    """Draw retrains that are measured on the same examples; returns (repetitions, retrains, 3) counts."""
    right = rng.random((repetitions, 1, n)) < ACCURACY  # the champion's outcomes stay
    drawn = []
    for _ in range(RETRAINS):
        candidate, champion = flip(np.where(right[:, 0], 0.0, 1.0), rng.random((repetitions, n)), effect, 0.2)
        gained, lost = (candidate > champion).sum(1), (candidate < champion).sum(1)
        drawn.append(np.stack([gained, lost, champion.sum(1).astype(int) - lost], axis=1))
    return np.stack(drawn, axis=1)


def compare_retrains(repetitions: int) -> tuple[dict[int, dict[str, Floats]], list[str]]:
    """Print the chance of a false promotion within so many retrains, and the power of a later one."""
    rng, curves, missed = np.random.default_rng(2), {}, []
    print(f"\n3. Retrains against one held-out set, 20 % flipped, {repetitions:,} repetitions\n")
    for n in (200, 1000):
        same, better = retrain(rng, n, 0.0, repetitions), retrain(rng, n, 0.05, repetitions)
        promoted = {
            "point ≥": same[..., 0] >= same[..., 1],
            **{rule: in_turn(same, n, rule) for rule in SPENT},
        }
        curves[n] = {rule: np.logical_or.accumulate(hits, axis=1).mean(0) for rule, hits in promoted.items()}
        looks = (1, 2, 5, 10, 20)
        print(f"n = {n}: at least one false promotion within k retrains that change nothing")
        print(f"{'k':>18}  " + "  ".join(f"{k:>6}" for k in looks))
        for rule, curve in curves[n].items():
            print(f"{rule:>18}  " + "  ".join(f"{curve[k - 1]:.4f}" for k in looks), flush=True)
        print(f"n = {n}: power of the k-th decision for a model that is 5 points better")
        for rule in SPENT:
            power = in_turn(better, n, rule).mean(0)
            print(f"{rule:>18}  " + "  ".join(f"{power[k - 1]:.4f}" for k in looks), flush=True)
        for rule in SPENT[1:]:
            if curves[n][rule][-1] > noisy(ALPHA, repetitions):
                missed.append(f"{RETRAINS} retrains, n = {n}, {rule}: {curves[n][rule][-1]:.4f}")
    return curves, missed


def in_turn(counts: NDArray[np.int64], n: int, rule: str) -> Hits:
    """Return what the gate says of each retrain at the level of its turn."""
    at = spend(rule)
    return np.stack([decided(counts[:, k], n, at(k)) for k in range(counts.shape[1])], axis=1)


# --- 4. every kind of test ------------------------------------------------------------------------------------------


def flips(rng: np.random.Generator, n: int, delta: float, flipped: float = 0.2) -> Arms:
    """Draw 0/1 outcomes: the reference is right with `ACCURACY`, and a share `flipped` of examples turns."""
    return (*flip(rng.random(n), rng.random(n), delta, flipped), None)


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


def passes(arms: Arms, **test: Any) -> bool:
    """Return whether a comparison passes."""
    candidate, reference, clusters = arms
    return paired_test(candidate, reference, better="higher", alpha=ALPHA, clusters=clusters, **test).passed is True


def keeps(arms: Arms, bound: float) -> bool:
    """Return whether the candidate's own mean is shown to lie below a bound."""
    return bound_test(arms[0], bound, better="lower", alpha=ALPHA, clusters=arms[2]).passed is True


def boundaries() -> list[tuple[str, int, Callable[..., Arms], Callable[[Arms], bool]]]:
    """Return every kind of test, drawn where its claim is only just false."""
    better = partial(passes, test="superiority")
    no_worse = partial(passes, test="non_inferiority", margin=MARGIN)
    rows: list[tuple[str, int, Callable[..., Arms], Callable[[Arms], bool]]] = []
    for n in (50, 200, 500):
        rows += [
            ("0/1, better", n, partial(flips, delta=0.0), better),
            ("0/1, better, few flips", n, partial(flips, delta=0.0, flipped=0.03), better),
            ("0/1, no worse", n, partial(flips, delta=-MARGIN), no_worse),
            ("0/1, no worse, only losses", n, partial(flips, delta=-MARGIN, flipped=MARGIN), no_worse),
            ("0/1, below a bound", n, partial(flips, delta=0.0), partial(keeps, bound=ACCURACY)),
            ("shares, better", n, partial(shares, delta=0.0), better),
            ("shares, no worse", n, partial(shares, delta=-MARGIN), no_worse),
            ("shares, no worse, a few break", n, partial(breaks, delta=-MARGIN), no_worse),
            ("shares, below a bound", n, partial(shares, delta=0.0), partial(keeps, bound=0.7)),
            ("clusters, better", 5 * n, partial(clustered, delta=0.0), better),
            ("clusters, no worse", 5 * n, partial(clustered, delta=-MARGIN), no_worse),
            ("clusters, no worse, only losses", 5 * n, partial(clustered, delta=-MARGIN, flipped=MARGIN), no_worse),
            ("clusters, below a bound", 5 * n, partial(clustered, delta=0.0), partial(keeps, bound=ACCURACY)),
            ("two rows share a cluster, no worse", n, partial(repeated, delta=-MARGIN), no_worse),
        ]
    return rows


def check_boundaries(repetitions: int) -> list[str]:
    """Print the rate of false passes of every kind of test; returns what is above α."""
    limit, missed = noisy(ALPHA, repetitions), []
    print(f"\n4. False passes where the claim is only just false; α = {ALPHA}, limit with noise {limit:.3f}\n")
    for name, n, draw, says in boundaries():
        rng = np.random.default_rng(1)
        rate = sum(says(draw(rng, n)) for _ in range(repetitions)) / repetitions
        if rate > limit:
            missed.append(f"{name}, n = {n}: {rate:.3f}")
        print(f"{name:<36} n = {n:>4}  {rate:.3f}{'' if rate <= limit else '  ABOVE'}", flush=True)
    return missed


# --- 5. speed -------------------------------------------------------------------------------------------------------


def time_decisions(count: int = 10_000) -> list[str]:
    """Print how long whole decisions take: 400 examples, three metrics; returns what missed."""
    rng, settings = np.random.default_rng(3), policy(3)
    drawn = [correlated(rng, 400, [0.02, 0.02, 0.0], 0.2) for _ in range(count)]
    start = time.process_time()
    for arms in drawn:
        promotes(*arms, settings, ALPHA)
    seconds = time.process_time() - start
    print(f"\n5. {count:,} decisions on 400 examples and three metrics: {seconds:.1f} s of CPU", flush=True)
    return [f"{count:,} decisions took {seconds:.0f} s"] if seconds > 60 else []


def write_rates(
    path: str,
    rates: Mapping[tuple[int, float, float], Mapping[str, float]],
    curves: Mapping[int, Mapping[str, Floats]],
    repetitions: int,
) -> None:
    """Write what a run's report shows, rule by rule."""
    rules = list(next(iter(rates.values())))

    def rounded(row: Mapping[str, float]) -> dict[str, float]:
        return {rule: round(share, 4) for rule, share in row.items()}

    def worst(effect: float) -> dict[str, float]:
        return {rule: max(rates[n, effect, flipped][rule] for n in SIZES for flipped in FLIPPED) for rule in rules}

    told = {
        "repetitions": repetitions,
        "alpha": ALPHA,
        "first": round(FIRST, 4),
        "accuracy": ACCURACY,
        "flipped": SHOWN,
        "sizes": SIZES,
        "rates": {f"{effect:+g}": [rounded(rates[n, effect, SHOWN]) for n in SIZES] for effect in (-0.05, 0, 0.05)},
        "worst": {f"{effect:+g}": rounded(worst(effect)) for effect in (-0.05, 0)},
        "retrains": {
            "n": min(curves),
            "rates": {rule: [round(float(share), 4) for share in curve] for rule, curve in curves[min(curves)].items()},
        },
    }
    Path(path).write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def plot(path: str, rates: Mapping[tuple[int, float, float], Mapping[str, float]], curves: Any) -> None:
    """Draw false promotions and power by n, and false promotions by the number of retrains."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = ["point ≥", "drop ≤ 1 pp", "unpaired", "McNemar", "gate, looks: 1", "gate, default"]
    styles = dict(zip(names, [":", "-.", (0, (1, 3)), "-", "--", "-"], strict=True))
    colours = dict(zip(names, ["#b84a00", "#d9a441", "#6b5b95", "#8793a1", "#0b62a8", "#0b62a8"], strict=True))
    figure, grid = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    axes = grid.ravel()
    titles = {-0.05: "5 points worse: promoted", 0.0: "unchanged: promoted", 0.05: "5 points better: promoted"}
    for axis, (effect, title) in zip(axes, titles.items(), strict=False):
        for name in names:
            axis.plot(
                SIZES, [rates[n, effect, SHOWN][name] for n in SIZES], label=name, ls=styles[name], c=colours[name]
            )
        axis.set(title=title, xscale="log", xlabel="held-out examples, 20 % flipped", xticks=SIZES)
        axis.set_xticklabels([str(n) for n in SIZES])
        axis.minorticks_off()
    axes[0].legend(frameon=False)
    later = dict(zip(["point ≥", *SPENT], [":", "-.", "--", "-"], strict=True))
    for rule, style in later.items():
        colour = colours.get(rule, "#0b62a8")
        axes[3].plot(range(1, RETRAINS + 1), curves[min(curves)][rule], label=rule, ls=style, c=colour)
    axes[3].set(title="unchanged, k retrains: promoted at least once", xlabel="k, n = 200", xticks=[1, 5, 10, 15, 20])
    axes[3].legend(frameon=False)
    for axis in (axes[1], axes[3]):
        axis.axhline(ALPHA, c="#17202b", lw=0.7)
        axis.annotate("α", (1, ALPHA), xycoords=("axes fraction", "data"), xytext=(4, -3), textcoords="offset points")
    for axis in axes:
        axis.set_ylim(0, None)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Print all tables, and write the figure and the rates where a path is given."""
    asked = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asked.add_argument("--repetitions", type=int, default=20_000, help="of a cell of the first table")
    asked.add_argument("--figure", help="file to draw, .png")
    asked.add_argument("--rates", help="file to write, .json")
    given = asked.parse_args()
    rates, missed = compare_rules(given.repetitions)
    missed += compare_metrics(given.repetitions // 20)
    curves, more = compare_retrains(given.repetitions // 10)
    missed += more + check_boundaries(given.repetitions // 40) + time_decisions()
    if given.figure:
        plot(given.figure, rates, curves)
    if given.rates:
        write_rates(given.rates, rates, curves, given.repetitions)
    print("\n" + ("\n".join(f"MISSED: {goal}" for goal in missed) if missed else "Every goal is met."))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
