"""The task of a user's own tools: what is right, what is nearly right, and what needs no call."""

import json
from typing import Any

import pytest

from assay.components.contracts.errors import DataError, RecipeError
from assay.components.contracts.rows import Message
from assay.components.shared.tasks.task import get_task

TASK = get_task("tool_calls")


def call(name: str = "refill", **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


REFERENCE = json.dumps([call(drug="metformin", days=30), call("notify", by="mail")])


def test_the_reference_itself_is_right_and_applies_to_no_request_without_calls():
    assert TASK.score(REFERENCE, REFERENCE) == {"exact": 1, "tool": 1, "arguments": 1, "needless": None, "valid": 1}
    assert TASK.reward(REFERENCE, REFERENCE) == pytest.approx(1)
    assert TASK.reward(REFERENCE, REFERENCE, finished=False) == 0


def test_what_is_nearly_right_earns_a_part():
    wrong = json.dumps([call(drug="metformin", days=90), call("notify", by="mail")])
    scores = TASK.score(wrong, REFERENCE)
    assert (scores["exact"], scores["tool"], scores["arguments"]) == (0, 1, pytest.approx(2 / 3))
    other = json.dumps([call(drug="metformin", days=30), call("inform", by="mail")])
    assert TASK.score(other, REFERENCE)["arguments"] == pytest.approx(2 / 3)
    more = json.dumps([*json.loads(REFERENCE), call("notify", by="phone", at=9)])
    assert TASK.score(more, REFERENCE)["arguments"] == pytest.approx(3 / 5)
    assert 0 < TASK.reward(other, REFERENCE) < TASK.reward(wrong, REFERENCE) < 0.5


def test_what_is_no_call_is_nothing():
    assert TASK.score("I refilled it.", REFERENCE) == {
        "exact": 0,
        "tool": 0,
        "arguments": 0,
        "needless": None,
        "valid": 0,
    }
    assert TASK.reward("I refilled it.", REFERENCE) == 0


def test_a_request_that_needs_no_call_tells_needless_ones():
    assert TASK.score("[]", "[]") == {"exact": 1, "tool": 1, "arguments": None, "needless": 0, "valid": 1}
    assert TASK.reward("[]", "[]") == pytest.approx(1)
    assert TASK.score(json.dumps(call(drug="x")), "[]")["needless"] == 1
    assert TASK.score("no call needed", "[]")["needless"] == 1


def test_slices_tell_how_many_calls_and_which_tool():
    assert TASK.slices([], REFERENCE) == ["calls=2", "tool=refill"]
    assert TASK.slices([], "[]") == ["calls=0"]
    assert TASK.slices([], json.dumps([call()] * 5))[0] == "calls=3+"
    with pytest.raises(DataError, match="no call of a tool"):
        TASK.slices([], "call it")


def test_rows_come_from_a_file_and_equal_requests_are_one_group():
    with pytest.raises(RecipeError, match="has no generator"):
        TASK.generate(1, 0)
    assert TASK.group([Message(role="user", content="Refill  IT")]) == TASK.group(TASK.prompt("refill it"))
