"""Intervals and tests against published or hand values, and against simulation."""

import numpy as np
import pytest

from assay.components.shared.statistics import (
    Counts,
    bound_test,
    clopper_pearson,
    examples_to_show,
    examples_to_tell,
    holm,
    mcnemar,
    mean_interval,
    paired_difference,
    paired_test,
    proportion,
    required_n,
    tango,
    tango_z,
)


def pairs(rng: np.random.Generator, n: int, lost: float, gained: float) -> tuple[list[float], list[float]]:
    """Paired 0/1 outcomes of a candidate and a reference with these shares of discordant pairs."""
    draw = rng.random(n)
    candidate = np.where(draw < lost, 0.0, np.where(draw < lost + gained, 1.0, (rng.random(n) < 0.7).astype(float)))
    reference = np.where(draw < lost, 1.0, np.where(draw < lost + gained, 0.0, candidate))
    return candidate.tolist(), reference.tolist()


def test_wilson_agrees_with_statsmodels_and_does_not_collapse():
    from statsmodels.stats.proportion import proportion_confint

    for successes, n in ((0, 10), (3, 10), (10, 10), (180, 400)):
        low, high = proportion_confint(successes, n, 0.05, method="wilson")
        ours = proportion(successes, n)
        assert (ours.low, ours.high) == pytest.approx((low, high), abs=1e-9)
        assert ours.low < ours.high


def test_mcnemar_is_the_exact_binomial():
    assert mcnemar(Counts(10, 2, 100)) == pytest.approx(79 / 4096)  # (C(12,10)+C(12,11)+C(12,12)) / 2^12
    assert mcnemar(Counts(0, 0, 100)) == 1.0


def test_tango_at_zero_difference_is_mcnemars_score_statistic():
    # At δ = 0 Tango's statistic is (b − c) / √(b + c).
    assert tango_z(Counts(10, 2, 100), 0.0) == pytest.approx(8 / 12**0.5)


def test_tango_interval_inverts_its_test_and_has_a_width_without_discordance():
    low, high = tango(Counts(10, 2, 100))
    assert tango_z(Counts(10, 2, 100), low) == pytest.approx(1.959964, abs=1e-4)
    assert tango_z(Counts(10, 2, 100), high) == pytest.approx(-1.959964, abs=1e-4)
    low, high = tango(Counts(0, 0, 50))
    assert low == pytest.approx(-high)
    assert 0.06 < high < 0.08


@pytest.mark.parametrize("confidence", [0.90, 0.95])
def test_tango_covers(confidence):
    rng, covered = np.random.default_rng(0), 0
    for _ in range(800):
        new, old = pairs(rng, 120, 0.10, 0.15)
        interval = paired_difference(new, old, confidence)
        covered += interval.low <= 0.05 <= interval.high
    assert covered / 800 > confidence - 0.025  # three standard errors


def test_non_inferiority_keeps_its_level_at_the_margin():
    rng = np.random.default_rng(1)
    passed = 0
    for _ in range(1500):
        candidate, reference = pairs(rng, 200, 0.125, 0.075)  # truly 5 points worse
        tested = paired_test(candidate, reference, better="higher", test="non_inferiority", margin=0.05, alpha=0.05)
        passed += tested.passed is True
    assert passed / 1500 <= 0.05 + 3 * (0.05 * 0.95 / 1500) ** 0.5


def test_lower_is_better_turns_the_difference():
    better = paired_test([0.0] * 40, [1.0] * 20 + [0.0] * 20, better="lower")
    assert better.difference.mean == 0.5
    assert better.passed is True
    assert (better.candidate, better.reference) == (0.0, 0.5)


def test_values_that_do_not_apply_are_left_out_and_counted():
    tested = paired_test([1.0, None, 1.0, 0.0], [0.0, 1.0, None, 0.0], better="higher")
    assert tested.difference.n == 2
    nothing = paired_test([None], [1.0], better="higher")
    assert (nothing.passed, nothing.difference.n) == (None, 0)


def test_clusters_widen_the_interval_and_weaken_the_test():
    new, old = [1.0, 1.0, 1.0, 1.0, 0.0] * 8, [0.0] * 40
    keys = [i // 5 for i in range(40)]
    alone = paired_test([1.0] * 5 + [0.0] * 35, old, better="higher")
    together = paired_test([1.0] * 5 + [0.0] * 35, old, better="higher", clusters=keys)
    assert alone.p_value < 0.05 < together.p_value  # five rows of one customer are one draw
    assert paired_difference(new, old, clusters=keys).n == 40


def test_fractional_scores_are_resampled_repeatably():
    rng = np.random.default_rng(2)
    new = rng.random(80).tolist()
    old = (np.asarray(new) - 0.1 + rng.normal(0, 0.1, 80)).clip(0, 1).tolist()
    first, again = (paired_test(new, old, better="higher") for _ in range(2))
    assert first == again
    assert first.passed is True
    assert first.difference.low > 0


def test_a_mean_without_variance_still_has_an_interval():
    interval = mean_interval([0.5] * 20)
    assert interval.low < 0.5 < interval.high


def test_an_open_question_says_how_many_examples_would_close_it():
    candidate = [1.0] * 14 + [0.0] * 8 + [1.0] * 78  # 14 gained, 8 lost of 100
    reference = [0.0] * 14 + [1.0] * 8 + [1.0] * 78
    tested = paired_test(candidate, reference, better="higher")
    assert tested.passed is None
    assert tested.needed is not None
    assert tested.needed > 100
    assert required_n(np.asarray([-1.0, 0.0]), 0.0, 0.05, 2) is None  # points the other way: more would not help


def test_tango_gives_the_published_interval():
    # Airway hyper-responsiveness before and after transplantation, 1 and 7 discordant of 21 (Fagerland, Lydersen and
    # Laake 2014, Statistics in Medicine 33: 2850): −0.517 to −0.026.
    assert tango(Counts(1, 7, 21)) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(("gained", "lost", "n"), [(5, 0, 200), (10, 2, 100), (20, 11, 60)])
def test_on_differences_of_one_gaffkes_bound_is_mcnemars_exact_test(gained, lost, n):
    candidate = [1.0] * gained + [0.0] * (n - gained)
    reference = [0.0] * gained + [1.0] * lost + [0.0] * (n - gained - lost)
    halved = [[value / 2 for value in side] for side in (candidate, reference)]  # no longer 0/1, and half the range
    tested = paired_test(*halved, better="higher", high=0.5)
    assert tested.p_value == pytest.approx(mcnemar(Counts(gained, lost, n)), abs=0.006)  # three errors of 10,000 draws


def test_gaffkes_bound_on_a_mean_is_clopper_and_pearsons():
    from scipy.stats import beta

    interval = mean_interval([2.0] * 7 + [0.0] * 23, 0.90, high=2.0)
    ends = beta.ppf(0.05, 7, 24), beta.ppf(0.95, 8, 23)
    # A quantile of 10,000 draws errs by 0.002; three of these.
    assert (interval.low / 2, interval.high / 2) == pytest.approx(ends, abs=0.006)


def test_a_test_passes_just_when_its_interval_is_above_the_bar():
    rng = np.random.default_rng(3)
    for margin in (0.0, 0.02, 0.05, 0.08):
        candidate = np.where(rng.random(150) < 0.06, 0.1, 0.9)
        tested = paired_test(
            candidate.tolist(), [0.9] * 150, better="higher", test="non_inferiority", margin=margin, alpha=0.05
        )
        assert (tested.passed is True) == (tested.difference.low > -margin)


def test_a_few_heavy_losses_among_equal_scores_are_not_taken_for_no_worse():
    # A share of 1 in 18 breaks down from 0.9 to 0: exactly the margin. A sign-flip test passes one time in five here.
    rng, passed = np.random.default_rng(4), 0
    for _ in range(400):
        candidate = np.where(rng.random(50) < 0.05 / 0.9, 0.0, 0.9).tolist()
        tested = paired_test(candidate, [0.9] * 50, better="higher", test="non_inferiority", margin=0.05)
        passed += tested.passed is True
    assert passed / 400 <= 0.05


def test_rows_of_one_cluster_keep_the_level_of_non_inferiority():
    rng, passed = np.random.default_rng(5), 0
    keys = [row // 5 for row in range(300)]
    for _ in range(400):
        candidate, reference = (np.repeat(side, 5).tolist() for side in pairs(rng, 60, 0.05, 0.0))
        tested = paired_test(candidate, reference, better="higher", test="non_inferiority", margin=0.05, clusters=keys)
        passed += tested.passed is True
    assert passed / 400 <= 0.05


def test_a_margin_on_superiority_is_the_least_gain():
    candidate, reference = [1.0] * 70 + [0.0] * 30, [1.0] * 60 + [0.0] * 40  # ten gained, none lost
    assert paired_test(candidate, reference, better="higher").passed is True
    assert paired_test(candidate, reference, better="higher", margin=0.09).passed is None
    assert paired_test(candidate, reference, better="higher", margin=0.30).passed is False


def test_the_order_of_the_rows_changes_nothing():
    values = np.random.default_rng(6).random(60).tolist()
    assert mean_interval(values).low == mean_interval(values[::-1]).low


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03], 0.05) == [True, False, False]
    assert holm([0.01, 0.02, 0.04], 0.05) == [True, True, True]


def test_clopper_and_pearson_agree_with_statsmodels():
    from statsmodels.stats.proportion import proportion_confint

    for successes, n in ((0, 10), (3, 10), (10, 10), (66, 174)):
        expected = proportion_confint(successes, n, 0.10, method="beta")
        assert clopper_pearson(successes, n, 0.90) == pytest.approx(expected, abs=1e-9)


def test_a_bound_is_a_ceiling_or_a_floor_as_the_metric_points():
    from scipy.stats import binom

    few = [1.0] * 66 + [0.0] * 108
    ceiling = bound_test(few, 0.5, better="lower")
    assert ceiling.passed is True
    assert ceiling.p_value == pytest.approx(binom.cdf(66, 174, 0.5))
    assert (ceiling.candidate, ceiling.reference) == (pytest.approx(66 / 174), 0.5)
    assert ceiling.difference.mean == pytest.approx(0.5 - 66 / 174)
    assert bound_test(few, 0.5, better="higher").passed is False
    assert bound_test(few, 0.4, better="lower").passed is None  # 0.379 is below 0.4, and the data do not show it
    assert bound_test(few, 0.4, better="lower").needed > 174
    assert bound_test([1.0 - value for value in few], 0.5, better="higher").p_value == ceiling.p_value


def test_a_bound_without_a_single_failure_is_the_rule_of_three():
    assert bound_test([0.0] * 598, 0.005, better="lower").passed is True  # 0.995^598 = 0.0499
    assert bound_test([0.0] * 597, 0.005, better="lower").passed is None
    assert bound_test([None, None], 0.5, better="lower").difference.n == 0


def test_a_bound_passes_just_when_its_interval_is_on_the_right_side():
    for failures in range(41):
        tested = bound_test([1.0] * failures + [0.0] * (40 - failures), 0.3, better="lower")
        assert (tested.passed is True) == (tested.difference.low >= 0)
        assert (tested.passed is False) == (tested.difference.high <= 0)


def test_a_bound_on_rows_of_one_cluster_keeps_its_level():
    # Each row taken for a draw of its own would pass far too often.
    rng, together, alone = np.random.default_rng(7), 0, 0
    keys = [row // 5 for row in range(200)]
    for _ in range(400):
        values = np.repeat((rng.random(40) < 0.3).astype(float), 5)
        together += bound_test(values, 0.3, better="lower", clusters=keys).passed is True
        alone += bound_test(values, 0.3, better="lower").passed is True
    assert together / 400 <= 0.05
    assert alone / 400 > 0.15


def test_a_rating_of_ones_and_zeros_is_not_taken_for_a_proportion():
    ones = [1.0] * 30 + [0.0] * 10
    assert mean_interval(ones, high=5.0).high > 1  # a rating of 5 was not seen and is possible
    share, rating = (paired_test(ones, ones, better="higher", high=high).difference for high in (1.0, 5.0))
    assert rating.high > share.high


def test_a_small_level_draws_more():
    # Six of a hundred break from 0.9 to 0: the bound at a level of 1/10,000 must not be the least of 10,000 draws.
    candidate, reference = [0.0] * 6 + [0.9] * 94, [0.9] * 100
    tested = paired_test(candidate, reference, better="higher", test="non_inferiority", margin=0.3, alpha=1e-4)
    assert tested.passed is True
    assert tested.p_value < 1e-4


def test_examples_to_show_have_the_power_they_promise_and_never_fewer_than_mcnemar_needs():
    rng, n = np.random.default_rng(3), examples_to_show(0.1, 0.05)
    shown = sum(paired_test(*pairs(rng, n, 0.05, 0.15), better="higher").passed is True for _ in range(600))
    assert shown / 600 > 0.8 - 0.15  # the exact test is a little weaker than the approximation it is planned by
    assert examples_to_show(1.0, 0.05) == 5  # 1/32 is the first power of a half below 0.05


def test_examples_to_tell_end_an_open_question():
    n = examples_to_tell(0.83, 0.8, 0.05)
    assert n is not None
    assert proportion(0.83 * n, n, 0.90).low > 0.8
    assert examples_to_tell(0.8, 0.8, 0.05) is None
