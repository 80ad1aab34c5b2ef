"""Agreement beyond chance, against published examples, another implementation, and simulation."""

from itertools import product

import numpy as np
import pytest
from statsmodels.stats.inter_rater import cohens_kappa as reference

from assay.components.shared.agreement import cohens_kappa, krippendorff_alpha

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: four observers, twelve units.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


def items(table: list[list[int]]) -> tuple[list[int], list[int]]:
    cells = [(i, j) for i, j in product(range(len(table)), repeat=2) for _ in range(table[i][j])]
    return [i for i, _ in cells], [j for _, j in cells]


@pytest.mark.parametrize(
    ("table", "kappa"),
    [
        ([[88, 14, 18], [10, 40, 10], [2, 6, 12]], 0.492),  # Cohen 1960, table 1
        ([[106, 10, 4], [22, 28, 10], [2, 12, 6]], 0.429),  # Fleiss, Cohen and Everitt 1969, table 1
    ],
)
def test_kappa_is_the_published_one_and_its_interval_tends_to_the_normal_one(table, kappa):
    found, normal = cohens_kappa(*items(table), range(3)), reference(table)
    assert found.mean == pytest.approx(kappa, abs=5e-4)
    assert found.mean == pytest.approx(normal.kappa, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((normal.kappa_low, normal.kappa_upp), abs=0.012)


def test_weighted_kappa_is_statsmodels():
    table = [[30, 5, 2, 0, 0], [6, 20, 9, 1, 0], [1, 8, 25, 7, 2], [0, 2, 9, 22, 8], [0, 0, 2, 7, 34]]
    found, normal = cohens_kappa(*items(table), range(5), weights="quadratic"), reference(table, wt="quadratic")
    assert found.mean == pytest.approx(normal.kappa, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((normal.kappa_low, normal.kappa_upp), abs=0.02)


def test_kappa_of_ten_that_agree_leaves_doubt_and_of_one_word_says_nothing():
    found = cohens_kappa("aaaaabbbbb", "aaaaabbbbb", "ab")
    assert (found.mean, found.high) == (1, 1)
    assert 0.4 < found.low < 0.9
    assert cohens_kappa("aaaa", "aaaa", "ab") is None
    assert cohens_kappa("", "", "ab") is None
    assert cohens_kappa("aaab", "aaaa", "ab").mean == 0  # what it always says it would say by chance


def test_the_interval_of_kappa_holds_the_true_one():
    rng, truth, held = np.random.default_rng(1), np.array([[0.35, 0.1, 0.05], [0.05, 0.2, 0.05], [0.02, 0.03, 0.15]]), 0
    chance = truth.sum(1) @ truth.sum(0)
    kappa = (np.trace(truth) - chance) / (1 - chance)
    for _ in range(200):
        drawn = rng.multinomial(30, truth.ravel()).reshape(3, 3).tolist()
        found = cohens_kappa(*items(drawn), range(3))
        held += found.low <= kappa <= found.high
    assert held / 200 >= 0.95 - 0.031  # two standard errors


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_is_the_published_one(level, alpha):
    assert krippendorff_alpha(OBSERVERS, level) == pytest.approx(alpha, abs=5e-4)


def test_alpha_at_its_ends():
    assert krippendorff_alpha([[1, 2, 3], [1, 2, 3]]) == pytest.approx(1)
    assert krippendorff_alpha([[1, 2, 1, 2], [2, 1, 2, 1]], "nominal") < 0
    assert krippendorff_alpha([[3, 3], [3, 3]]) is None
    assert krippendorff_alpha([[1, None], [None, 2]]) is None
    rng = np.random.default_rng(0)
    assert abs(krippendorff_alpha(rng.integers(1, 6, (3, 2000)).tolist(), "ordinal")) < 0.04  # raters who guess
