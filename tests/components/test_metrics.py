"""Every metric at its edges: undefined, nothing said, everything wrong; and against other people's code."""

import json
import random
from itertools import combinations
from typing import Any

import pytest

from assay.components.contracts.errors import DataError
from assay.components.shared.metrics import (
    Assertion,
    Detection,
    Dosing,
    Patient,
    acceptance,
    calls_exact,
    creatinine_clearance,
    detect,
    dose_scores,
    exact_match,
    field_accuracy,
    judge_dose,
    label_scores,
    milligrams,
    pairs,
    pooled,
    prevention_rate,
    read_calls,
    recall_at,
    reciprocal_rank,
    reference_dose,
    token_f1,
    win_points,
    words,
)
from assay.components.shared.statistics import mean_interval

# --- text -----------------------------------------------------------------------------------------------------------


def test_exact_match_folds_case_width_and_white_space_only():
    assert exact_match(" Paris\n", "ｐａｒｉｓ") == 1.0
    assert exact_match("Paris.", "Paris") == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [  # as torchmetrics' copy of SQuAD's own script gives them; on 5,000 random pairs the two never differed
        ("The Cat sat", "a cat sat down", 0.8),
        ("the", "a", 1.0),
        ("", "cat", 0.0),
        ("", "", 1.0),
        ("don't", "dont", 1.0),
        ("cat cat", "cat", 2 / 3),
    ],
)
def test_token_f1_is_squads(answer, reference, value):
    assert token_f1(answer, reference) == pytest.approx(value)
    assert token_f1(reference, answer) == pytest.approx(value)


def test_token_f1_with_other_tokens_keeps_articles():
    assert token_f1("the cat", "cat", words) == pytest.approx(2 / 3)


def test_fields_that_are_made_up_count_against_and_a_text_that_is_no_object_has_none():
    assert field_accuracy('{"a": 1, "b": 2, "c": 3}', '{"a": 1, "b": 5}') == pytest.approx(1 / 3)
    assert field_accuracy('{"a": 1.0}', '{"a": 1}') == 0.0
    assert field_accuracy("a: 1", '{"a": 1}') == 0.0
    with pytest.raises(DataError, match="is no JSON object"):
        field_accuracy("{}", "[1]")


def test_ranks_count_from_one_and_none_is_not_found():
    assert [recall_at(rank, 5) for rank in (1, 5, 6, None)] == [1, 1, 0, 0]
    assert [reciprocal_rank(rank) for rank in (1, 4, None)] == [1, 0.25, 0]


def test_a_tie_is_half_a_win():
    assert mean_interval([win_points(one) for one in ("a", "b", "tie", "a")]).mean == 0.625


# --- calls of tools -------------------------------------------------------------------------------------------------

CALL = '{"name": "refill", "arguments": {"drug": "x", "days": 30, "tags": ["a", "b"]}}'


def test_calls_are_read_in_every_form_and_nothing_else_is():
    other = {"id": "1", "type": "function", "function": {"name": "refill", "arguments": '{"drug": "x", "days": 30}'}}
    wanted = read_calls('{"name": "refill", "arguments": {"drug": "x", "days": 30}}')
    assert read_calls(json.dumps([other])) == wanted
    assert read_calls('{"name": "now"}') == [("now", {})]
    assert read_calls("[]") == []
    for bad in (
        "",
        "refill(x)",
        '{"name": 1}',
        '{"name": "a", "arguments": "{"}',
        f"{CALL} done",
        "[1]",
        '{"name": "a", "x": 1}',
    ):
        assert read_calls(bad) is None, bad


def test_a_call_is_exact_by_name_and_arguments_whatever_the_order_of_keys():
    turned = '{"arguments": {"tags": ["a", "b"], "days": 30, "drug": "x"}, "name": "refill"}'
    assert calls_exact(turned, CALL) == 1.0
    for wrong in (
        CALL.replace("refill", "refuse"),
        CALL.replace("30", "30.0"),
        CALL.replace("30", '"30"'),
        CALL.replace(', "days": 30', ""),
        CALL.replace('"x"', '"x", "more": 1'),
        CALL.replace('["a", "b"]', '["b", "a"]'),
        "no call",
    ):
        assert calls_exact(wrong, CALL) == 0.0, wrong


def test_order_counts_unless_the_caller_says_otherwise():
    assert calls_exact(CALL.replace('["a", "b"]', '["b", "a"]'), CALL, sets={"tags"}) == 1.0
    assert calls_exact(CALL.replace('["a", "b"]', '["b", "b"]'), CALL, sets={"tags"}) == 0.0
    two, turned = f'[{CALL}, {{"name": "now"}}]', f'[{{"name": "now"}}, {CALL}]'
    assert calls_exact(turned, two) == 0.0
    assert calls_exact(turned, two, any_order=True) == 1.0
    assert calls_exact(f"[{CALL}, {CALL}]", two, any_order=True) == 0.0
    with pytest.raises(DataError, match="no call of a tool"):
        calls_exact(CALL, "call it")


# --- pharmacy -------------------------------------------------------------------------------------------------------

DRUGS = ["warfarin", "ibuprofen", "amoxicillin", "digoxin"]
KNOWN = pairs([("Warfarin", "Ibuprofen"), ("digoxin", "amoxicillin")])


def test_a_pair_has_no_order_and_a_brand_is_its_drug():
    assert pairs([("Ibuprofen ", "COUMADIN")], {"coumadin": "warfarin"}) <= KNOWN
    for bad in (["warfarin", "Warfarin"], ["warfarin"], ["a", "b", "c"]):
        with pytest.raises(DataError, match="are not two drugs"):
            pairs([bad])


def test_misses_and_false_alarms_are_told_apart():
    found = detect(pairs([("ibuprofen", "warfarin"), ("digoxin", "warfarin")]), KNOWN, DRUGS)
    assert found == Detection(hits=1, misses=1, alarms=1, clear=3)
    assert (found.sensitivity, found.specificity) == (0.5, 0.75)
    nothing = detect(set(), KNOWN, DRUGS)
    assert (nothing.sensitivity, nothing.specificity) == (0.0, 1.0)


def test_a_rate_of_nothing_is_none():
    assert detect(set(), set(), DRUGS).sensitivity is None
    assert detect(KNOWN, pairs([("warfarin", "ibuprofen")]), ["warfarin", "ibuprofen"]).specificity == 0.0
    assert detect(set(), pairs([("warfarin", "ibuprofen")]), ["warfarin", "ibuprofen"]).specificity is None
    with pytest.raises(DataError, match="does not have both"):
        detect(set(), KNOWN, ["warfarin"])


@pytest.mark.parametrize("seed", range(30))
def test_detection_agrees_with_scikit_learn(seed):
    from sklearn.metrics import recall_score

    rng = random.Random(seed)
    every = [frozenset(pair) for pair in combinations(DRUGS, 2)]
    known, named = ({pair for pair in every if rng.random() < 0.5} for _ in range(2))
    found = detect(named, known, DRUGS)
    right, said = [pair in known for pair in every], [pair in named for pair in every]
    if known:
        assert found.sensitivity == pytest.approx(recall_score(right, said, pos_label=True))
    if known != set(every):
        assert found.specificity == pytest.approx(recall_score(right, said, pos_label=False))


def test_pooled_shares_count_trials_and_draw_examples():
    rate = pooled([(1, 1), (0, 3), (0, 0)])
    assert rate is not None
    assert (rate.mean, rate.n) == (0.25, 4)
    alone = pooled([(1, 1)] + [(0, 1)] * 3)
    assert alone is not None
    assert rate.high > alone.high  # three trials of one example say less than three examples
    assert pooled([(0, 0)]) is None


@pytest.mark.parametrize(
    ("amount", "unit", "mg"), [(500, "mcg", 0.5), (500, "µg", 0.5), (500, "μg", 0.5), (1, "G", 1000)]
)
def test_masses_are_compared_in_milligrams(amount, unit, mg):
    assert milligrams(amount, unit) == pytest.approx(mg)


def test_a_unit_that_is_no_mass_is_refused():
    with pytest.raises(DataError, match="no unit of mass"):
        milligrams(5, "mL")


def test_creatinine_clearance_is_cockcroft_and_gaults():
    assert creatinine_clearance(60, 72, 1.0, female=False) == pytest.approx(80.0)
    assert creatinine_clearance(60, 72, 1.0, female=True) == pytest.approx(68.0)
    with pytest.raises(DataError, match="above 0"):
        creatinine_clearance(60, 72, 0.0, female=False)


def test_a_dose_follows_weight_age_kidneys_and_the_cap():
    rule = Dosing(mg=10, per_kg=True, child_mg_per_kg=15, cap=600, renal=((50, 0.5), (30, 0.25)))
    assert reference_dose(rule, Patient(age=40, weight=50)) == 500
    assert reference_dose(rule, Patient(age=40, weight=90)) == 600
    assert reference_dose(rule, Patient(age=11.9, weight=20)) == 300
    assert reference_dose(rule, Patient(age=12, weight=20)) == 200
    at = [Patient(age=80, weight=60, creatinine=60 * 60 / (72 * clearance)) for clearance in (50, 49.9, 30, 29.9)]
    assert [reference_dose(rule, patient) for patient in at] == [600, 300, 300, 150]  # a band begins below its edge
    assert reference_dose(Dosing(mg=500), Patient(age=40, weight=200)) == 500


@pytest.mark.parametrize(
    ("given_", "wanted", "cap", "verdict"),
    [
        (500, 500, None, "right"),
        (525, 500, None, "right"),  # 5 %, and no more
        (526, 500, None, "over"),
        (475, 500, None, "right"),
        (474, 500, None, "under"),
        (510, 500, 500, "over"),  # within the tolerance, above the cap
        (0.5, 500, None, "under"),  # milligrams taken for micrograms, the other way
        (5000, 500, 500, "tenfold"),
        (4999, 500, None, "over"),
        (0.1 + 0.2, 0.3, 0.3, "right"),
        (700, (500, 750), None, "right"),
        (800, (500, 750), None, "over"),
    ],
)
def test_doses_are_right_over_under_or_tenfold(given_, wanted, cap, verdict):
    assert judge_dose(given_, wanted, cap=cap) == verdict


def test_a_tenfold_dose_is_an_overdose_too():
    assert dose_scores("tenfold") == {"dose": 0.0, "overdose": 1.0, "underdose": 0.0, "tenfold": 1.0}
    assert dose_scores("right")["dose"] == 1.0


def test_prevention_of_nothing_is_undefined_and_new_errors_count_against():
    assert prevention_rate(0, 0) is None
    assert prevention_rate(3, 0) is None
    rate = prevention_rate(20, 30)
    assert rate is not None
    assert rate.mean == pytest.approx(1 / 3)
    assert rate.low < 0 < rate.high  # 50 errors do not show a third
    worse = prevention_rate(30, 20)
    assert worse is not None
    assert worse.mean == pytest.approx(-0.5)
    none_left = prevention_rate(0, 10)
    assert none_left is not None
    assert (none_left.mean, none_left.high) == (1.0, 1.0)
    assert none_left.low == pytest.approx(1 - (1 / 0.025 ** (1 / 10) - 1))  # (1 - p)^10 = 0.025


def test_prevention_is_per_direction_where_exposures_differ():
    rate = prevention_rate(10, 10, exposures=(2000, 1000))
    assert rate is not None
    assert rate.mean == pytest.approx(0.5)


def test_prevention_covers():
    import numpy as np

    rng, covered, tried = np.random.default_rng(0), 0, 2000
    for _ in range(tried):
        rate = prevention_rate(int(rng.poisson(8)), max(1, int(rng.poisson(12))))
        assert rate is not None
        covered += rate.low <= 1 / 3 <= rate.high
    assert covered / tried >= 0.95 - 3 * (0.05 * 0.95 / tried) ** 0.5


def test_an_omission_lowers_compliance_and_a_contradicted_contraindication_is_a_breach():
    told: Any = [("indication", "stated"), ("contraindication", "omitted"), ("maximum_dose", "stated")]
    assert label_scores([Assertion(*one) for one in told])["breach"] == 0.0
    assert label_scores([Assertion(*one) for one in told])["compliance"] == pytest.approx(2 / 3)
    barred = label_scores(
        [*(Assertion("other", "stated") for _ in range(9)), Assertion("contraindication", "contradicted")]
    )
    assert barred == {"compliance": 0.9, "contradiction": 0.1, "breach": 1.0}
    assert label_scores([Assertion("indication", "contradicted")])["breach"] is None
    assert label_scores([])["compliance"] is None


def test_edited_then_accepted_is_an_override_and_what_nobody_saw_is_in_neither_rate():
    rates = acceptance(["accepted", "edited", "rejected", None, "accepted", None])
    assert rates is not None
    assert (rates.accepted.mean, rates.accepted.n) == (0.5, 4)
    assert rates.overridden.mean == 0.5
    assert rates.overridden.low == pytest.approx(1 - rates.accepted.high)
    assert acceptance([None, None]) is None
    crowd: Any = ["accepted"] * 10 + ["rejected"] * 10
    alone, two = acceptance(crowd), acceptance(crowd, ["one"] * 10 + ["other"] * 10)
    assert alone is not None
    assert two is not None
    assert two.accepted.high - two.accepted.low > alone.accepted.high - alone.accepted.low


@pytest.mark.parametrize("values", [[1.0] * 10, [0.0] * 10, [0.5] * 10, [1.0]])
def test_intervals_do_not_collapse_at_the_ends(values):
    interval = mean_interval(values)
    assert 0 <= interval.low < interval.high <= 1
