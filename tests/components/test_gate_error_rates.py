"""The gate's error rates, by its own code: exact sums where the counts are few, seeded simulation elsewhere."""

from functools import cache

import numpy as np
import pytest
from scipy.stats import binom

from assay.components.contracts.metrics import Metric
from assay.components.contracts.recipe import Criterion, GateSettings
from assay.components.gate.decide import Scores, Turn, decide, findings_of
from assay.components.shared.looks import level

METRICS = [Metric(name=name, title=name, better="higher", definition="") for name in ("a", "b", "c")]
DIGESTS = {"baseline": "b", "candidate": "c", "champion": "h"}
FIRST = level(0.05, 0, [])


def promotes(columns: dict[str, tuple[np.ndarray, np.ndarray]], at: float) -> bool:
    """Return whether the gate promotes: every metric must be better than the champion's at a level."""
    criteria = [Criterion(metric=name, versus=["champion"]) for name in columns]
    settings = GateSettings(alpha=at, min_examples=1, criteria=criteria)
    candidate, champion = ({name: pair[side] for name, pair in columns.items()} for side in (0, 1))
    findings = findings_of(settings, METRICS, Scores({"candidate": candidate, "champion": champion}))
    n = len(next(iter(candidate.values())))
    return decide(settings, findings, DIGESTS, n, METRICS, Turn(1, at)).decision == "promote"


@cache
def promoted(gained: int, lost: int, n: int, at: float) -> bool:
    candidate, champion = np.zeros(n), np.zeros(n)
    candidate[:gained] = champion[gained : gained + lost] = 1
    return promotes({"a": (candidate, champion)}, at)


def rate(n: int, effect: float, flipped: float, at: float) -> float:
    """Return the exact chance to promote, summed over every number of gained and lost examples."""
    total = 0.0
    for discordant in range(1, n + 1):
        chance = binom.pmf(discordant, n, flipped)
        if chance > 1e-9:
            gained = np.arange(discordant + 1)
            passing = [promoted(int(b), int(discordant - b), n, at) for b in gained]
            total += chance * binom.pmf(gained, discordant, (flipped + effect) / 2 / flipped)[passing].sum()
    return total


@pytest.mark.parametrize("n", [50, 100])
def test_an_unchanged_model_is_promoted_at_alpha_at_most_whatever_share_flips(n):
    for flipped in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4):
        assert rate(n, 0.0, flipped, 0.05) <= 0.05
        assert rate(n, 0.0, flipped, FIRST) <= FIRST


@pytest.mark.parametrize("n", [50, 100])
def test_a_model_five_points_worse_is_promoted_once_in_two_hundred_at_most_by_default(n):
    assert max(rate(n, -0.05, flipped, FIRST) for flipped in (0.05, 0.1, 0.2, 0.3, 0.4)) <= 0.005


def test_the_gate_promotes_just_where_mcnemars_exact_test_does():
    for gained in range(20):
        for lost in range(20):
            exact = gained + lost > 0 and binom.sf(gained - 1, gained + lost, 0.5) <= 0.05
            assert promoted(gained, lost, 60, 0.05) == exact


def flips(rng: np.random.Generator, n: int, effect: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw 0/1 outcomes of a candidate and a champion that is right in 0.6; 20 % flip."""
    champion, draw = rng.random(n) < 0.6, rng.random(n)
    lost = champion & (draw < (0.2 - effect) / 1.2)
    gained = ~champion & (draw < (0.2 + effect) / 0.8)
    return ((champion & ~lost) | gained).astype(float), champion.astype(float)


def test_one_unchanged_metric_of_three_keeps_a_model_out():
    rng = np.random.default_rng(0)
    drawn = [{"a": flips(rng, 200, 0.0), "b": flips(rng, 200, 0.15), "c": flips(rng, 200, 0.15)} for _ in range(500)]
    assert sum(promotes(one, 0.05) for one in drawn) / 500 <= 0.05 + 3 * (0.05 * 0.95 / 500) ** 0.5


def test_twenty_retrains_that_change_nothing_are_promoted_at_alpha_at_most():
    rng, n, repetitions = np.random.default_rng(1), 200, 400
    spent = {name: np.zeros(repetitions, dtype=bool) for name in ("each", "planned", "open")}
    for k in range(20):
        levels = {"each": 0.05, "planned": level(0.05, 20, [False] * k), "open": level(0.05, 0, [False] * k)}
        for repetition in range(repetitions):
            gained, lost = (int(count) for count in rng.multinomial(n, [0.1, 0.1, 0.8])[:2])
            for name, at in levels.items():
                spent[name][repetition] |= promoted(gained, lost, n, at)
    assert spent["each"].mean() > 0.3  # what the spending is for
    limit = 0.05 + 3 * (0.05 * 0.95 / repetitions) ** 0.5
    assert spent["planned"].mean() <= limit
    assert spent["open"].mean() <= limit
