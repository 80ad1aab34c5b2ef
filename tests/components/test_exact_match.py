import pytest

from assay.components.contracts.errors import RecipeError
from assay.components.contracts.rows import Message
from assay.components.shared.tasks.exact_match import TASK
from assay.components.shared.tasks.task import get_task


@pytest.mark.parametrize("response", ["Paris", " paris\n", "PARIS", "\uff30aris"])
def test_case_space_and_width_do_not_matter(response: str) -> None:
    assert TASK.score(response, "Paris") == {"exact": 1.0}
    assert TASK.reward(response, "Paris") == 1.0


@pytest.mark.parametrize("response", ["", "Paris.", "Paris, France", "Par is"])
def test_anything_else_is_wrong(response: str) -> None:
    assert TASK.score(response, "Paris") == {"exact": 0.0}
    assert TASK.reward(response, "Paris") == 0.0


def test_a_text_cut_short_earns_nothing() -> None:
    assert TASK.reward("Paris", "Paris", finished=False) == 0.0


def test_equal_last_questions_share_a_group() -> None:
    plain = TASK.prompt("Capital of France?")
    longer = [
        Message(role="user", content="Hello"),
        Message(role="assistant", content="Hello."),
        Message(role="user", content="capital  of france?"),
    ]
    assert TASK.group(plain) == TASK.group(longer)
    assert TASK.group(plain) != TASK.group(TASK.prompt("Capital of Spain?"))


def test_there_is_no_generator() -> None:
    with pytest.raises(RecipeError, match="no generator"):
        TASK.generate(10, seed=0)


def test_every_listed_task_can_be_had_by_name() -> None:
    assert [get_task(name).name for name in ("exact_match", "medication_directions")] == [
        "exact_match",
        "medication_directions",
    ]


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(RecipeError, match="choose one of"):
        get_task("poetry")
