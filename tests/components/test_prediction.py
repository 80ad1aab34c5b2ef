"""Prediction-powered inference: the papers' formulas, and its coverage by simulation."""

import numpy as np
import pytest

from assay.components.contracts.rows import Verdict
from assay.components.shared import statistics
from assay.components.shared.prediction import corrected_win_rate, prediction_powered
from assay.components.shared.statistics import mean_interval


def judged(rng: np.random.Generator, n: int, skill: float) -> tuple[np.ndarray, np.ndarray]:
    """Return points of comparisons (1, ½, 0), and what a judge says of them, who knows a share of them."""
    y = rng.choice([0.0, 0.5, 1.0], p=[0.25, 0.15, 0.6], size=n)
    return y, np.where(rng.random(n) < skill, y, rng.choice([0.0, 0.5, 1.0], p=[0.1, 0.1, 0.8], size=n))


def test_the_estimate_and_its_power_are_the_papers_and_the_interval_tends_to_theirs():
    n, others = 2000, 8000
    y, f = judged(np.random.default_rng(0), n + others, 0.7)
    found = prediction_powered([*y[:n], *[None] * others], f.tolist(), 0.95)
    power = np.cov(y[:n], f[:n])[0, 1] / ((1 + n / others) * f.var(ddof=1))
    mean = power * f[n:].mean() + (y[:n] - power * f[:n]).mean()
    error = np.sqrt(power**2 * f[n:].var() / others + (y[:n] - power * f[:n]).var() / n)
    assert (found.mean, found.power, found.n, found.predicted) == (pytest.approx(mean), pytest.approx(power), n, others)
    assert 0.5 < found.power < 1
    assert (found.low, found.high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.06 * error + 5e-4)
    alone = mean_interval(y[:n].tolist())
    assert found.high - found.low < 0.8 * (alone.high - alone.low)


def test_the_interval_holds_the_true_mean_and_the_test_its_level(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 2000)
    rng, held, shown, truth, runs, widths = np.random.default_rng(1), 0, 0, 0.675, 400, []
    for _ in range(runs):
        y, f = judged(rng, 200, 0.8)
        found = prediction_powered([*y[:40], *[None] * 160], f.tolist(), bar=truth)
        held += found.low <= truth <= found.high
        shown += found.p_value <= 0.05
        alone = mean_interval(y[:40].tolist())
        widths.append((found.high - found.low) / (alone.high - alone.low))
    assert held / runs >= 0.95 - 0.022  # two standard errors
    assert shown / runs <= 0.05 + 0.022
    assert np.mean(widths) < 0.9
    assert abs(truth - judged(rng, 20_000, 0.8)[1].mean()) > 0.02  # what the judge by itself would be wrong by


def test_grades_are_corrected_within_their_scale(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng, held, raw, runs = np.random.default_rng(3), 0, 0, 60
    truth = 3.0
    for _ in range(runs):
        y = rng.integers(1, 6, 300).astype(float)
        f = np.clip(y + 0.7 + rng.normal(0, 0.3, 300), 1, 5)  # a judge that is too kind
        found = prediction_powered([*y[:100], *[None] * 200], f.tolist(), low=1, high=5)
        plain = mean_interval(f.tolist(), low=1, high=5)
        held += found.low <= truth <= found.high
        raw += plain.low <= truth <= plain.high
    assert held / runs >= 0.95 - 0.057  # two standard errors
    assert raw == 0
    assert found.power > 0.5


def test_a_judge_that_guesses_adds_nothing_and_full_labels_need_none():
    y, f = judged(np.random.default_rng(2), 260, 0.0)
    guess = prediction_powered([*y[:60], *[None] * 200], f.tolist())
    assert guess.power < 0.2
    assert guess.mean == pytest.approx(y[:60].mean(), abs=0.02)
    full = prediction_powered(y.tolist(), f.tolist())
    assert (full.power, full.predicted, full.mean) == (0, 0, pytest.approx(y.mean()))
    assert prediction_powered([None] * 5, [1.0] * 5) is None


def test_equal_labels_leave_doubt_and_one_label_much():
    found = prediction_powered([*[1.0] * 10, *[None] * 90], [1.0] * 100, bar=0.5)
    assert (found.mean, found.high) == (1, 1)
    assert 0.6 < found.low < 0.8  # of ten that agree, whatever the judge says
    assert found.p_value < 0.01
    one = prediction_powered([1.0, *[None] * 99], [1.0] * 100, bar=0.5)
    assert one.low < 0.1
    assert one.p_value > 0.4


def test_labels_of_one_group_are_one_draw():
    y, f = (np.repeat(values, 4) for values in judged(np.random.default_rng(4), 200, 0.8))
    labels, groups = [*y[:200], *[None] * 600], [place // 4 for place in range(800)]
    alone, grouped = (prediction_powered(labels, f.tolist(), clusters=keys) for keys in (None, groups))
    assert alone.mean == pytest.approx(grouped.mean)
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)  # twice, but for the bound's own width


def test_a_win_rate_is_that_of_the_labels_where_the_judge_errs():
    def verdict(place: int, winner: str, label: str | None) -> Verdict:
        return Verdict.model_validate(
            {"example_id": str(place), "group": str(place), "arm_a": "candidate", "arm_b": "baseline"}
            | {"winner": winner, "first": winner, "swapped": winner, "label": label}
        )

    flattered = [verdict(place, "a", ("b" if place % 2 else "a") if place < 40 else None) for place in range(200)]
    found = corrected_win_rate(flattered)
    assert (found.mean, found.n, found.predicted) == (0.5, 40, 160)
    assert found.p_value > 0.4
    assert corrected_win_rate([verdict(0, "a", None)]) is None
