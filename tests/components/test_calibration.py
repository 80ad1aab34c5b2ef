"""Confidence as a score: Brier's by example, the calibration error by hand."""

import pytest

from assay.components.contracts.rows import Result
from assay.components.shared.calibration import BRIER, CONFIDENCE, calibration_error, confidence_scores


def result(number: int, confidence: float | None, exact: float) -> Result:
    scores = {"exact": exact, CONFIDENCE: confidence}
    return Result(arm="a", example_id=str(number), group=str(number), response="", slices=[], scores=scores)


def test_briers_score_is_the_squared_distance_from_what_came_true() -> None:
    assert confidence_scores(0.75, 1.0) == {CONFIDENCE: 0.75, BRIER.name: 0.0625}
    assert confidence_scores(0.75, 0.0) == {CONFIDENCE: 0.75, BRIER.name: 0.5625}


def test_the_calibration_error_of_four_answers_is_the_one_worked_by_hand() -> None:
    # Bin 9: confidences 0.95 and 1.0, one right: |0.975 - 0.5|. Bin 2: 0.2 and 0.25, none right: 0.225.
    rows = [result(1, 0.95, 1), result(2, 1.0, 0), result(3, 0.2, 0), result(4, 0.25, 0)]
    found = calibration_error(rows, "exact", 0.95)
    assert found is not None
    assert found.mean == pytest.approx(0.5 * 0.475 + 0.5 * 0.225)
    assert found.n == 4
    assert found.low <= found.mean <= found.high
    assert calibration_error(rows, "exact", 0.95) == found


def test_answers_that_are_as_often_right_as_they_say_have_hardly_an_error() -> None:
    rows = [result(n, 0.85, float(n % 20 < 17)) for n in range(400)]
    found = calibration_error(rows, "exact", 0.95)
    assert found is not None
    assert found.mean == pytest.approx(0, abs=1e-12)
    assert 0 < found.high < 0.06


def test_answers_without_a_confidence_have_no_error() -> None:
    assert calibration_error([result(1, None, 1)], "exact", 0.95) is None
