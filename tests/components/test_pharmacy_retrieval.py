"""Retrieval rows: one passage answers each question, and only an answer that says it is right."""

from collections import Counter
from itertools import islice
from typing import Any

import pytest

from assay.components.contracts.errors import DataError, RecipeError
from assay.components.contracts.rows import Message
from assay.components.shared.tasks import retrieval
from assay.components.shared.tasks.pharmacy_retrieval import (
    MAX_MEDICINES,
    NAME_SHARES,
    TASK,
    TOPICS,
    TOPICS_EACH,
    medicines,
    misspell,
)
from assay.components.shared.tasks.retrieval import answers
from assay.components.shared.tasks.task import get_task


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(TASK.generate(2000, seed=0))


def texts(row: dict[str, Any]) -> tuple[str, str, str]:
    passage, question, answer = row["messages"]
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
    return passage["content"], question["content"], answer["content"]


def test_equal_seeds_give_equal_rows_and_a_longer_run_begins_with_a_shorter(rows: list[dict[str, Any]]) -> None:
    assert list(TASK.generate(101, seed=0)) == rows[:101]
    assert list(TASK.generate(10, seed=1)) != rows[:10]


def test_a_passage_states_its_answer_and_no_two_rows_share_one(rows: list[dict[str, Any]]) -> None:
    assert len({retrieval.normalise(texts(row)[0]) for row in rows}) == len(rows)
    for row in rows:
        passage, _, answer = texts(row)
        assert retrieval.normalise(answer) in retrieval.normalise(passage)
        assert TASK.reward(answer, answer) == 1


def test_a_medicine_is_one_group_with_a_passage_on_each_of_its_topics(rows: list[dict[str, Any]]) -> None:
    groups = Counter(row["group"] for row in rows)
    assert set(groups.values()) == {TOPICS_EACH}
    assert len({(row["group"], row["slices"]["about"]) for row in rows}) == len(rows)
    assert {row["slices"]["about"] for row in rows} == set(TOPICS)


def test_a_question_names_its_medicine_as_its_slice_says(rows: list[dict[str, Any]]) -> None:
    shares = Counter(row["slices"]["name"] for row in rows)
    assert all(abs(shares[how] / len(rows) - share) < 0.04 for how, share in NAME_SHARES.items())  # 3.6 standard errors
    for row in rows:
        passage, question, _ = (text.lower() for text in texts(row))
        generic, brand = row["group"].lower(), passage.split("(brand ")[1].split(")")[0]
        named = {"generic": generic in question, "brand": brand in question, "misspelt": False}
        assert named[row["slices"]["name"]] or row["slices"]["name"] == "misspelt"


def test_medicines_come_in_pairs_that_look_alike() -> None:
    import random

    made = list(islice(medicines(random.Random(0)), MAX_MEDICINES))
    assert len({name for medicine in made for name in medicine}) == 2 * MAX_MEDICINES
    assert all(one.generic[:3] == other.generic[:3] for one, other in zip(made[::2], made[1::2], strict=True))


def test_a_slip_is_one_letter() -> None:
    import random

    rng = random.Random(0)
    for _ in range(200):
        slip = misspell("Velmorin", rng)
        assert slip != "Velmorin"
        assert slip[0] == "V"
        assert abs(len(slip) - 8) <= 1


@pytest.mark.parametrize(
    ("response", "reference", "right"),
    [
        ("240 mg", "240 mg", True),
        ("The maximum is 240 mg a day.", "240 mg", True),
        ("240mg", "240 mg", False),
        ("1,500 mg", "1500 mg", True),
        ("1240 mg", "240 mg", False),
        ("240 mg, or 480 mg", "240 mg", False),
        ("for 3 days take 240 mg", "240 mg", True),
        ("240 mg", "24 mg", False),
        ("2.5 mg", "5 mg", False),
        ("Chest pain.", "chest pain", True),
        ("chest painful", "chest pain", False),
        ("30 °C", "30 °C", True),
        ("", "30 °C", False),
    ],
)
def test_an_answer_says_the_reference_and_no_other_quantity_of_its_unit(
    response: str, reference: str, right: bool
) -> None:
    assert answers(response, reference) is right
    assert TASK.score(response, reference)["answer"] == right


def test_a_text_does_not_say_how_it_was_found() -> None:
    scores = TASK.score("240 mg", "240 mg")
    assert set(scores) == {metric.name for metric in TASK.metrics}
    assert {name for name, value in scores.items() if value is None} == {"recall_1", "recall_5", "mrr_10"}


def test_more_rows_than_there_are_medicines_are_refused() -> None:
    with pytest.raises(RecipeError, match="the generator knows 8,000 questions"):
        next(TASK.generate(8001, seed=0))


def test_rows_of_ones_own_need_a_passage_and_have_no_generator() -> None:
    task = get_task("retrieval")
    with pytest.raises(RecipeError, match="the task retrieval has no generator"):
        task.generate(1, 0)
    with pytest.raises(DataError, match="before its answer") as error:
        task.slices(task.prompt("how warm?"), "25 °C")
    assert "the passage" in error.value.fix
    prompt = [Message(role="system", content="Below 25  °C."), Message(role="user", content="how warm?")]
    assert task.slices(prompt, "25 °C") == []
    assert task.group(prompt) == "below 25 °c."
