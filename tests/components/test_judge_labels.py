"""People's grades: how they are read, what they measure of a judge, and what they correct."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_judge import ARMS, RUBRIC, TASK, Fake, example, graded, knows, result, results, right, run, wrong

from assay.components.contracts.errors import DataError
from assay.components.contracts.recipe import JudgeSettings
from assay.components.contracts.rows import Grade, Label, Verdict, read_rows
from assay.components.judge import believe
from assay.components.judge import compare as work
from assay.components.judge.labels import by_answer, card, read_labels
from assay.components.shared.questions import Answer
from assay.components.shared.summary import read_summary


@pytest.fixture(autouse=True)
def own_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_WORK", str(tmp_path / "work"))


def label(number: int, response: str, grade: float, rater: str = "ann") -> Label:
    return Label(example_id=example(number).id, response=response, grade=grade, rater=rater)


def write(path: Path, labels: list[Label]) -> Path:
    path.write_text("".join(json.dumps(one.model_dump()) + "\n" for one in labels), encoding="utf-8")
    return path


def test_labels_are_read_and_averaged_over_raters(tmp_path: Path) -> None:
    given = [label(1, "2", 5), label(1, "2", 4, "bob"), label(1, "about 1", 1), label(9, "gone", 3)]
    read = read_labels(write(tmp_path / "labels.jsonl", given))
    assert read == given
    assert by_answer(read)[(example(1).id, "2")] == 4.5
    told = card(read, results(right, wrong, 3))
    assert (told["given"], told["used"], told["raters"]) == (4, 3, 2)
    twins = [label(n, "x", 1 + n % 5, rater) for n in range(10) for rater in ("ann", "bob")]
    assert card(twins, [])["alpha"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", r"labels\.jsonl:2.*the line"),
        ("{", r"labels\.jsonl:2"),
        ('{"example_id": "a", "response": "b", "grade": 6}', "grade: Input should be less than or equal to 5"),
        ('{"example_id": "a", "response": "b", "grade": 2, "arm": "sft"}', "arm: Extra inputs"),
        (json.dumps(label(1, "2", 3).model_dump()), "graded this answer before"),
    ],
)
def test_what_is_no_label_is_named_by_its_line(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path / "labels.jsonl", [label(1, "2", 5)])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=words):
        read_labels(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path / "nowhere.jsonl")


def test_people_label_and_the_verifier_does_not_where_they_were_asked() -> None:
    pair = work.Pair(example(1), result("candidate", 1, "2"), result("baseline", 1, "3"))
    key = example(1).id
    assert work.label(pair, TASK) == "a"
    assert work.label(pair, TASK, {(key, "2"): 2, (key, "3"): 4}) == "b"
    assert work.label(pair, TASK, {(key, "2"): 4, (key, "3"): 4}) == "tie"
    assert work.label(pair, TASK, {(key, "2"): 2}) is None
    assert work.label(pair, TASK, {}) is None


def kind(answer: Answer) -> float:
    """A judge that gives every answer too much, the longer ones most."""
    return 4.0 if answer.answer.isdigit() else 5.0


def test_grades_are_corrected_by_people_who_saw_a_part(tmp_path: Path) -> None:
    rows = results(right, wrong)
    people = [label(n, text, grade) for n in range(16) for text, grade in ((right(n), 5), (wrong(n), 2 - n % 2))]
    pairs = work.pair_up(rows, [example(number) for number in range(24)], ARMS, 24)
    known = by_answer(people)
    verdicts = work.compare(pairs, Fake(lambda _: "tie"), TASK, "Which?", known)
    assert sum(verdict.label == "a" for verdict in verdicts) == 16
    made = graded(rows, [Fake(knows, kind)], labels=known)
    assert sum(row.label is not None for row in made) == 32
    found = believe.grading(made, verdicts, ARMS, JudgeSettings())
    assert found["difference"]["mean"] == -1
    assert found["difference"]["corrected"]["mean"] == pytest.approx(3.5)
    assert (found["difference"]["corrected"]["n"], found["difference"]["corrected"]["predicted"]) == (16, 8)
    assert found["difference"]["corrected"]["low"] > 0
    assert found["arms"]["baseline"]["corrected"]["mean"] == pytest.approx(1.5)
    assert found["arms"]["baseline"]["corrected"]["low"] >= 1
    assert (found["agreement"]["mean"], found["may_decide"]) == (0, False)
    assert found["kappa"]["n"] == 32
    assert found["kappa"]["mean"] < 0


def test_kappa_and_length_tell_a_judge_that_likes_what_is_long() -> None:
    def longest(question: object) -> str:
        first, second = question.first, question.second  # type: ignore[attr-defined]
        return "first" if len(first) > len(second) else "second"

    rows = results(right, lambda n: wrong(n) if n % 2 else f"{n + 1}{n}")
    pairs = work.pair_up(rows, [example(number) for number in range(24)], ARMS, 24)
    found = believe.reliability(work.compare(pairs, Fake(longest), TASK, "Which?"))  # type: ignore[arg-type]
    assert (found["longer"]["mean"], found["longer"]["n"]) == (1, 24)
    assert found["labels_longer"]["mean"] == 0
    assert found["longer"]["low"] > 0.8
    assert found["first"]["mean"] == 0.5
    assert found["kappa"]["mean"] == pytest.approx(0, abs=1e-9)  # it says "b" and the labels "a": never by habit alike
    likes_first = believe.reliability(work.compare(pairs, Fake(lambda _: "first", identity="f"), TASK, "Which?"))
    assert (likes_first["first"]["mean"], likes_first["swap_consistency"]["mean"]) == (1, 0)
    tired = believe.reliability(work.compare(pairs, Fake(lambda _: "tie", identity="t"), TASK, "Which?"))
    assert (tired["abstained"], tired["unparsed"], tired["first"]["mean"]) == (24, 0, None)


def test_a_judge_that_knows_has_a_kappa_of_one() -> None:
    rows = results(lambda n: right(n) if n % 2 else wrong(n), lambda n: wrong(n) if n % 2 else right(n))
    pairs = work.pair_up(rows, [example(number) for number in range(24)], ARMS, 24)
    found = believe.reliability(work.compare(pairs, Fake(knows), TASK, "Which?"))
    assert found["kappa"]["mean"] == 1
    assert 0.7 < found["kappa"]["low"] < found["kappa"]["high"] == 1


def test_a_panel_decides_by_majority_and_grades_by_mean_or_median() -> None:
    rows = results(right, wrong)
    pairs = work.pair_up(rows, [example(number) for number in range(24)], ARMS, 24)
    flips = Fake(lambda _: "first", identity="flips")
    fakes = [Fake(knows, lambda _: 1.0), Fake(knows, lambda _: 2.0, "second"), flips]
    flips.rate = lambda _: 5.0
    each = {fake.identity: work.compare(pairs, fake, TASK, "Which?") for fake in fakes}
    panel = work.combine(list(each.values()))
    assert {(one.winner, one.first, one.swapped, tuple(one.votes)) for one in panel} == {
        ("a", "a", "a", ("a", "a", "tie"))
    }
    assert {one.winner for one in work.combine([each["fake"], each["flips"]])} == {"tie"}  # one of two is no majority
    assert work.combine([each["fake"]]) == each["fake"]
    assert {(row.grade, tuple(row.grades)) for row in graded(rows, fakes)} == {(8 / 3, (1, 2, 5))}
    assert {row.grade for row in graded(rows, fakes, aggregate="median")} == {2}
    flips.rate = lambda answer: None if answer.answer.isdigit() else 5.0
    flips.identity = "silent"
    assert {row.grade for row in graded(rows, fakes)} == {1.5, 8 / 3}
    told = believe.summarise(panel, ARMS, JudgeSettings(rubric=RUBRIC), panel=each, grades=graded(rows, fakes))
    assert told.details["judges"].keys() == each.keys()  # type: ignore[attr-defined]
    assert told.details["judges"]["flips"]["swap_consistency"]["mean"] == 0  # type: ignore[index]
    assert told.details["alpha"] < 0.1  # type: ignore[operator]  two say "a" always, one "tie": no more than by habit


def test_alpha_is_high_where_judges_agree_and_absent_for_one() -> None:
    def verdict(place: int, *votes: str) -> Verdict:
        fields = {"winner": votes[0], "first": votes[0], "swapped": votes[0], "votes": votes, "label": None}
        arms = {"arm_a": "candidate", "arm_b": "baseline", "example_id": str(place), "group": str(place)}
        return Verdict.model_validate(fields | arms)

    same = [verdict(n, *["ab"[n % 2]] * 3) for n in range(12)]
    assert believe.summarise(same, ARMS, JudgeSettings()).details["alpha"] == pytest.approx(1)
    assert believe.summarise([verdict(n, "a") for n in range(4)], ARMS, JudgeSettings()).details["alpha"] is None
    rng = np.random.default_rng(0)
    guess = [verdict(n, *rng.choice(["a", "b", "tie"], 3)) for n in range(400)]
    assert abs(believe.summarise(guess, ARMS, JudgeSettings()).details["alpha"]) < 0.08  # type: ignore[arg-type]


def test_step_reads_the_labels_and_tells_both_numbers(tmp_path: Path, tiny_model: Path) -> None:
    people = [label(n, text, grade) for n in range(12) for text, grade in ((right(n), 5), (wrong(n), 1))]
    path = write(tmp_path / "labels.jsonl", people)
    settings = JudgeSettings(rubric=RUBRIC, max_examples=24)
    verdicts, summary = run(tmp_path, tiny_model, results(right, wrong), settings, labels=path)
    told = read_summary(summary)
    assert {row.label for row in read_rows(verdicts / "verdicts.parquet", Verdict)} == {"a", None}
    assert sum(row.label is not None for row in read_rows(verdicts / "grades.parquet", Grade)) == 24
    assert told.details["labels"] == {"given": 24, "used": 24, "raters": 1, "alpha": None}
    corrected = told.details["win_rate_corrected"]
    assert (corrected["mean"], corrected["n"], corrected["predicted"]) == (1, 12, 12)  # type: ignore[index]
    assert told.details["grades"]["difference"]["corrected"]["mean"] == pytest.approx(4, abs=0.05)  # type: ignore[index]
    assert "people" in told.headline
