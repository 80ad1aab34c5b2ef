import itertools
import json
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.components.contracts.errors import DataError, RecipeError
from assay.components.shared.tasks import medication_directions
from assay.components.shared.tasks.medication_directions import (
    FLAG_SHARES,
    FREQUENCIES,
    NEAR_MISS,
    ROUTES,
    TASK,
    TYPOS,
    UNITS,
    Direction,
    draw,
    normalise,
    write,
)

SAFE = '{"dose":2,"unit":"tablet","route":"oral","per_day":2,"daily":4,"flag":"ok"}'
UNSAFE = '{"dose":2,"unit":"tablet","route":"oral","per_day":4,"prn":"pain","daily":8,"max":6,"flag":"over"}'
TAPER = '{"dose":2,"unit":"tablet","route":"oral","per_day":1,"days":3,"taper":[2,1],"daily":2,"flag":"ok"}'


def texts(row: dict[str, Any]) -> tuple[str, str]:
    system, user, assistant = row["messages"]
    assert (system["role"], user["role"], assistant["role"]) == ("system", "user", "assistant")
    return user["content"], assistant["content"]


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str]]:
    return [texts(row) for row in TASK.generate(5000, seed=0)]


def direction(**fields: Any) -> Direction:
    plain = {
        "low": None,
        "dose": 1,
        "unit": "tablet",
        "route": "oral",
        "per_day": 1,
        "prn": None,
        "days": None,
        "taper": None,
        "max": None,
    }
    return Direction(**(plain | fields))


def test_every_reference_is_perfect_against_itself(rows: list[tuple[str, str]]) -> None:
    for _, reference in rows:
        unsafe = json.loads(reference)["flag"] != "ok"
        assert TASK.score(reference, reference) == {
            "exact": 1.0,
            "near_miss": 0.0 if unsafe else None,
            "false_alarm": None if unsafe else 0.0,
            "valid": 1.0,
            "fields": 1.0,
        }
        assert TASK.reward(reference, reference) == 1.0


def test_references_are_compact_in_the_documented_order_and_true(rows: list[tuple[str, str]]) -> None:
    order = ["low", "dose", "unit", "route", "per_day", "prn", "days", "taper", "daily", "max", "flag"]
    for _, reference in rows:
        fields = json.loads(reference)
        assert list(fields) == [key for key in order if key in fields]
        assert reference == json.dumps(fields, separators=(",", ":"))
        assert fields["daily"] == fields["dose"] * fields["per_day"]


def test_generated_directions_differ_by_group(rows: list[tuple[str, str]]) -> None:
    groups = [TASK.group(TASK.prompt(text)) for text, _ in rows]
    assert len(set(groups)) == len(groups)


def test_equal_seeds_give_equal_rows_and_a_prefix() -> None:
    long = list(TASK.generate(60, seed=3))
    assert list(TASK.generate(20, seed=3)) == long[:20]
    assert list(TASK.generate(60, seed=4)) != long


def test_labels_are_spread_sensibly(rows: list[tuple[str, str]]) -> None:
    labels = Counter(label for text, reference in rows for label in TASK.slices(TASK.prompt(text), reference))
    assert 0.40 < labels["safety=unsafe"] / len(rows) < 0.50
    assert 0.35 < labels["difficulty=hard"] / len(rows) < 0.65
    for flag in FLAG_SHARES:
        assert labels[f"flag={flag}"] / len(rows) > 0.09
    answers = [json.loads(reference) for _, reference in rows]
    assert 0.02 < sum("taper" in answer for answer in answers) / len(rows) < 0.10
    assert 0.05 < sum("low" in answer for answer in answers) / len(rows) < 0.20
    assert any(TYPOS.keys() & set(text.lower().split()) for text, _ in rows)


def test_the_generator_says_when_it_knows_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medication_directions, "MAX_ATTEMPTS", 3)
    with pytest.raises(RecipeError, match="different directions"):
        list(TASK.generate(100_000, seed=0))


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({}, "ok"),
        ({"route": "eye"}, "route"),
        ({"route": "eye", "prn": "pain"}, "route"),
        ({"prn": "pain"}, "nomax"),
        ({"prn": "pain", "max": 1}, "ok"),
        ({"dose": 2, "per_day": 4, "max": 8}, "ok"),
        ({"dose": 2, "per_day": 4, "max": 7}, "over"),
        ({"low": 1, "dose": 2, "per_day": 4, "max": 6}, "over"),
    ],
)
def test_flag_is_the_first_problem_that_holds(fields: dict[str, Any], flag: str) -> None:
    assert direction(**fields).flag == flag


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Take 2 tabs PO q6h", "take two tablets by mouth every 6 hours"),
        ("2tabs p.o. q 6 h", "2 TABLET orally QID"),
        ("1 to 2 caps po bid prn pain, max 6/day", "take 1-2 capsules by mouth q12h as needed for pain (max 6 daily)"),
        ("5 cc po tid x5d", "5 mL by mouth three times daily for 5 days"),
        ("1 inh inhaled qd; not more than 2 per day", "one puff via inhaler daily, max 2/day"),
        ("3 tabs po qd x3d then 2 x3d", "three tablets orally every day for 3 days, then two for 3 days."),
        ("2 tabelts by moth twise dialy", "2 tablets by mouth twice daily"),
        ("1 gtt ou qhs", "1 drop in both eyes at bedtime"),
        ("1 tab pr qd", "one tablet rectally once daily"),
    ],
)
def test_two_spellings_of_a_direction_share_a_group(one: str, other: str) -> None:
    assert TASK.group(TASK.prompt(one)) == TASK.group(TASK.prompt(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2 tabs po q6h", "2 tabs po q8h"),
        ("2 tabs po qd", "3 tabs po qd"),
        ("2.5 mL po qd", "25 mL po qd"),
        ("1-2 tabs po qd", "1 tab po qd"),
        ("1 tab po qd prn pain", "1 tab po qd prn fever"),
        ("1 tab po qd x3d", "1 tab po qd, max 3/day"),
        ("1 tab po qd of aspirin", "1 tab po qd of ibuprofen"),
    ],
)
def test_different_directions_do_not(one: str, other: str) -> None:
    assert TASK.group(TASK.prompt(one)) != TASK.group(TASK.prompt(other))


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_way_to_write_a_direction_has_one_group(seed: int) -> None:
    drawn = draw(random.Random(seed))
    assert len({normalise(write(drawn, random.Random(other))) for other in range(20)}) == 1


def test_every_word_of_the_generator_is_folded() -> None:
    for forms in itertools.chain(UNITS.items(), ROUTES.items(), FREQUENCIES.items()):
        assert len({normalise(form) for form in forms[1]}) == 1, forms


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(max_codepoint=127), max_size=60))
def test_case_and_space_never_change_the_group(text: str) -> None:
    assert normalise(f"  {text.upper()} ") == normalise(text.replace(" ", "   ").lower())


@pytest.mark.parametrize(
    "response",
    [
        SAFE + " ",
        "\n" + SAFE,
        json.dumps(json.loads(SAFE), indent=1),
        json.dumps(dict(reversed(json.loads(SAFE).items()))),
    ],
)
def test_white_space_and_order_do_not_matter(response: str) -> None:
    assert TASK.score(response, SAFE)["exact"] == 1


@pytest.mark.parametrize(
    "response",
    [
        SAFE + SAFE,
        SAFE + " as you asked",
        "```json\n" + SAFE + "\n```",
        "Answer: " + SAFE,
        f"[{SAFE}]",
        json.dumps(SAFE),
        SAFE[:-1],
        SAFE.replace("{", '{"dose":3,'),
        SAFE.replace("{", '{"dose":2,'),
        SAFE.replace('"dose":2', '"dose":NaN'),
        SAFE.replace('"dose":2', '"dose":Infinity'),
        SAFE.replace('"dose":2', '"dose":' + "9" * 5000),
        "[" * 100_000,
        "",
        "null",
    ],
)
def test_what_is_not_one_strict_json_object_is_invalid(response: str) -> None:
    scores = TASK.score(response, SAFE)
    assert (scores["valid"], scores["exact"], scores["fields"]) == (0, 0, 0)
    assert TASK.reward(response, SAFE) == 0
    assert TASK.score(response, UNSAFE)["near_miss"] == 1


@pytest.mark.parametrize(
    "response",
    [
        SAFE.replace("}", ',"extra":1}'),
        SAFE.replace("}", ',"max":null}'),
        SAFE.replace('"dose":2', '"dose":2.0'),
        SAFE.replace('"dose":2', '"dose":"2"'),
        SAFE.replace('"dose":2', '"dose":[2]'),
        SAFE.replace("tablet", "Tablet"),
        SAFE.replace('"dose":2,', ""),
        "{}",
    ],
)
def test_what_differs_in_a_field_is_not_exact(response: str) -> None:
    assert TASK.score(response, SAFE)["valid"] == 1
    assert TASK.score(response, SAFE)["exact"] == 0
    assert TASK.reward(response, SAFE) < 0.5


@pytest.mark.parametrize("taper", ["[2,1.0]", "[2,true]", "[2]", "[1,2]", "[[2,1]]", "true"])
def test_lists_are_compared_in_type_and_order(taper: str) -> None:
    assert TASK.score(TAPER.replace("[2,1]", taper), TAPER)["exact"] == 0


def test_true_is_not_one() -> None:
    reference = SAFE.replace('"dose":2', '"dose":1')
    assert TASK.score(reference.replace('"dose":1', '"dose":true'), reference)["exact"] == 0


def test_piling_up_fields_pays_less_than_a_plain_attempt() -> None:
    plain = SAFE.replace('"daily":4', '"daily":5')
    piled = plain.replace("}", "".join(f',"k{number}":1' for number in range(50)) + "}")
    assert TASK.reward("{}", SAFE) < TASK.reward(piled, SAFE) < TASK.reward(plain, SAFE) < TASK.reward(SAFE, SAFE)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.dictionaries(st.sampled_from(["dose", "flag", "x"]), st.integers()).map(json.dumps)))
def test_only_the_right_answer_earns_the_full_reward(response: str) -> None:
    assert 0 <= TASK.reward(response, SAFE) < 1


def test_a_text_cut_short_earns_nothing() -> None:
    assert TASK.reward(SAFE, SAFE, finished=False) == 0


@pytest.mark.parametrize(
    ("flag", "missed"),
    [('"over"', 0), ('"route"', 0), ('"ok"', 1), ('"unsafe"', 1), ('""', 1), ("null", 1), ("true", 1), ('["over"]', 1)],
)
def test_near_miss_wants_a_known_flag(flag: str, missed: float) -> None:
    scores = TASK.score(UNSAFE.replace('"over"', flag), UNSAFE)
    assert scores["near_miss"] == missed
    assert scores["false_alarm"] is None


def test_near_miss_when_the_flag_is_missing() -> None:
    assert TASK.score(UNSAFE.replace(',"flag":"over"', ""), UNSAFE)["near_miss"] == 1


def test_false_alarm_is_a_flag_on_a_safe_direction() -> None:
    assert TASK.score(SAFE, SAFE)["false_alarm"] == 0
    assert TASK.score(SAFE.replace('"ok"', '"nomax"'), SAFE)["false_alarm"] == 1
    assert TASK.score("nothing", SAFE)["false_alarm"] == 0
    assert TASK.score(SAFE, SAFE)["near_miss"] is None


def test_the_primary_metric_stands_first() -> None:
    assert [metric.name for metric in TASK.metrics] == ["exact", "near_miss", "false_alarm", "valid", "fields"]
    assert TASK.score(SAFE, SAFE).keys() == {metric.name for metric in TASK.metrics}


@pytest.mark.parametrize("reference", ["", "2 tablets", "[]", "{}", '{"flag":"fine"}', '{"flag":["ok"]}'])
def test_a_reference_that_is_no_direction_is_the_datas_fault(reference: str) -> None:
    with pytest.raises(DataError, match="flag is one of"):
        TASK.score(SAFE, reference)


def test_slices() -> None:
    def of(text: str, reference: str) -> list[str]:
        return TASK.slices(TASK.prompt(text), reference)

    assert of("2 tabs po bid", SAFE) == ["difficulty=easy", "safety=safe", "flag=ok"]
    assert of("2 tabs po qid prn pain, max 6/day", UNSAFE) == ["difficulty=hard", "safety=unsafe", "flag=over"]
    assert of("2 tabs po qd x3d then 1 x3d", TAPER)[0] == "difficulty=hard"
    assert of("2 TABELTS po bid", SAFE)[0] == "difficulty=hard"


def test_an_unsafe_direction_that_passes_as_safe_costs_more_than_any_other_error() -> None:
    unsafe = SAFE.replace('"flag":"ok"', '"flag":"route"')
    assert unsafe != SAFE
    assert TASK.reward(SAFE, unsafe) == NEAR_MISS < TASK.reward("no JSON", unsafe)
    assert 0 < TASK.reward(unsafe, SAFE) < 0.5, "a false alarm is an error like another"
