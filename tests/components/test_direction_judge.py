"""The judge's task: its truth is the directions' verifier's, its prompt the local judge's; no pair is parted."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from assay.components.contracts.errors import DataError
from assay.components.contracts.recipe import EvaluateSettings, JudgeSettings, Recipe
from assay.components.contracts.rows import Example, Message, Result
from assay.components.judge.compare import Pair, both_orders
from assay.components.prepare_data.prepare import split_of
from assay.components.shared.agreement import CONSISTENCY, swap_consistency
from assay.components.shared.chat import completion_ids, prompt_ids
from assay.components.shared.generate import Generation, Generator
from assay.components.shared.judging import LocalJudge
from assay.components.shared.measure import measure, tabulate
from assay.components.shared.questions import PAIR_CLOSING, write_question
from assay.components.shared.tasks.direction_judge import MISTAKE_SHARES, REASONS, RUBRIC, read_question
from assay.components.shared.tasks.medication_directions import TASK as DIRECTIONS
from assay.components.shared.tasks.task import get_task
from assay.pipelines import cli

TASK = get_task("direction_judge")
ROWS = list(TASK.generate(1200, 0))
RECIPE = Recipe.load(cli.RECIPES / "direction-judge.yaml")


def parts(row: dict[str, Any]) -> tuple[list[Message], str]:
    *prompt, answer = (Message(**turn) for turn in row["messages"])
    return prompt, answer.content


def verdict_of(row: dict[str, Any]) -> str:
    return parts(row)[1].rpartition("\n")[2]


def examples(rows: list[dict[str, Any]]) -> list[Example]:
    made = []
    for number, row in enumerate(rows):
        prompt, reference = parts(row)
        group, slices = TASK.group(prompt), TASK.slices(prompt, reference)
        made.append(Example(id=f"{number:032x}", group=group, prompt=prompt, reference=reference, slices=slices))
    return made


def test_the_verdict_is_the_directions_verifiers() -> None:
    """The right answer is the one that the directions' own generator gives, and its verifier refuses the other."""
    known = {row["messages"][1]["content"]: row["messages"][2]["content"] for row in DIRECTIONS.generate(600, 0)}
    for row in ROWS:
        prompt, reference = parts(row)
        asked = read_question(prompt)
        right = known[asked.prompt.removeprefix("system: Sig to JSON.\nuser: ")]
        exact = [DIRECTIONS.score(answer, right)["exact"] for answer in (asked.first, asked.second)]
        assert exact == ([1, 0] if reference.endswith("A") else [0, 1]), prompt
        assert DIRECTIONS.score(asked.first, right)["valid"] == DIRECTIONS.score(asked.second, right)["valid"] == 1


def test_a_pair_stands_in_both_orders_so_that_no_position_is_right_more_often() -> None:
    pairs = defaultdict(list)
    for row in ROWS:
        prompt, reference = parts(row)
        asked = read_question(prompt)
        pairs[frozenset((asked.first, asked.second)), asked.prompt].append((asked.first, verdict_of(row)))
    assert all(sorted(verdict for _, verdict in rows) == ["A", "B"] for rows in pairs.values())
    assert all(rows[0][0] != rows[1][0] for rows in pairs.values())
    assert Counter(map(verdict_of, ROWS)) == {"A": 600, "B": 600}
    first = Counter(map(verdict_of, ROWS[::2]))
    assert first["A"] == pytest.approx(300, abs=50)  # four standard errors


def test_mistakes_are_of_every_kind_and_none_gives_the_answer_away_by_its_form() -> None:
    slices = Counter(label for example in examples(ROWS) for label in example.slices)
    assert sum(MISTAKE_SHARES.values()) == pytest.approx(1)
    assert min(slices[name] for name in ("fields=1", "fields=2", "fields=3+", "wrong=near_miss", "wrong=other")) > 100
    wrong_fields, longer = Counter(), 0
    for row in ROWS:
        prompt, reference = parts(row)
        asked = read_question(prompt)
        right, wrong = (asked.first, asked.second) if reference.endswith("A") else (asked.second, asked.first)
        longer += (len(right) > len(wrong)) - (len(right) < len(wrong))
        fields, others = (set(text.strip("{}").split(",")) for text in (right, wrong))
        wrong_fields.update(part.split(":")[0].strip('"') for part in fields ^ others)
    assert {"dose", "per_day", "route", "max", "flag", "daily"} <= wrong_fields.keys()
    assert abs(longer) / len(ROWS) < 0.15


def test_held_out_directions_share_nothing_with_training() -> None:
    """Both orders of a pair, and every spelling of its direction, fall on one side."""
    sides = defaultdict(set)
    for row in ROWS:
        prompt, _ = parts(row)
        group = TASK.group(prompt)
        sides[group].add(split_of(group, RECIPE.data))
        assert group == DIRECTIONS.group(DIRECTIONS.prompt(read_question(prompt).prompt.rpartition("user: ")[2]))
    assert len(sides) == 600
    assert all(len(names) == 1 for names in sides.values())
    one = TASK.generate(2, 0)
    prompt, _ = parts(next(one))
    direction = read_question(prompt).prompt.rpartition("user: ")[2]
    assert direction != direction.upper()
    respelt = [Message(role="user", content=prompt[0].content.replace(direction, direction.upper()))]
    assert TASK.group(respelt) == TASK.group(prompt)


@pytest.mark.parametrize("row", ROWS[:80:2])
def test_the_reasons_are_true_and_end_in_the_verdict(row: dict[str, Any]) -> None:
    """Read by the table alone: the first value is what the direction's answer has, the mark who else has it."""
    prompt, reference = parts(row)
    asked = read_question(prompt)
    a, b = json.loads(asked.first), json.loads(asked.second)
    right = a if reference.endswith("A") else b
    *lines, verdict = reference.split("\n")
    marks = set()
    for line, name in zip(lines, REASONS, strict=True):
        found, wanted, says_a, says_b, mark = re.fullmatch(r"(\w+) (\w+): (\w+) (\w+) ([=AB])", line).groups()
        assert found == name
        assert [wanted, says_a, says_b] == [str(fields.get(name, "none")) for fields in (right, a, b)]
        assert (mark == "=") == (says_a == says_b)
        marks.add(mark)
    assert marks - {"="} == {verdict}


def test_what_is_trained_is_what_the_local_judge_asks(tiny_model: Path) -> None:
    """Token for token: the judge step's question on two answers is the prompt of the row with these answers."""
    judge = LocalJudge(tiny_model, reply_tokens=4)
    direction = next(iter(DIRECTIONS.generate(1, 0)))["messages"]
    asked = read_question(parts(ROWS[0])[0])
    example = Example(
        id="0" * 32, group="g", prompt=[Message(**turn) for turn in direction[:2]], reference=direction[2]["content"]
    )
    a, b = (
        Result(arm=arm, example_id=example.id, group="g", response=text, slices=[], scores={})
        for arm, text in (("candidate", asked.first), ("baseline", asked.second))
    )
    assert JudgeSettings().rubric == RUBRIC
    both = both_orders(Pair(example, a, b), RUBRIC)
    assert judge._prompts([write_question(one, PAIR_CLOSING) for one in both]) == [
        prompt_ids(judge.tokenizer, parts(row)[0]) for row in ROWS[:2]
    ]


def test_a_judge_that_replies_is_read_as_the_task_is_scored(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the generator writes for a pair is the verdict; a reply that is cut is none."""
    judge = LocalJudge(tiny_model, reply_tokens=72)
    assert judge.identity != LocalJudge(tiny_model).identity
    questions = [read_question(parts(row)[0]) for row in ROWS[:3]]
    assert judge.compare(questions) == [None] * 3  # a random model
    assert judge.compare([]) == []

    class Taught(Generator):
        def generate(self, prompts: list[list[int]], **_: Any) -> list[list[Generation]]:
            return [
                [self.generation(completion_ids(self.tokenizer, parts(row)[1])[: None if whole else -1])]
                for row, whole in zip(ROWS[: len(prompts)], (True, True, False), strict=True)
            ]

    judge._generator = Taught(judge.model, judge.tokenizer)
    verdicts = {"A": "first", "B": "second"}
    assert judge.compare(questions) == [verdicts[verdict_of(row)] for row in ROWS[:2]] + [None]


def test_rows_are_the_seeds_and_stable_in_a_prefix() -> None:
    assert list(TASK.generate(41, 0)) == ROWS[:41]
    assert list(TASK.generate(40, 1)) != ROWS[:40]


@pytest.mark.parametrize(
    ("response", "reference", "agrees", "valid"),
    [
        ("A", "A", 1, 1),
        ("B", "A", 0, 1),
        ("B is better.", "B", 0.5, 0),
        ("The dose of A is wrong.\n\nB", "B", 1, 1),
        ("", "A", 0.5, 0),
        ("TIE", "A", 0.5, 0),
    ],
)
def test_scores(response: str, reference: str, agrees: float, valid: int) -> None:
    assert TASK.score(response, reference) == {"agreement": agrees, "unsafe_preferred": 1 - agrees, "valid": valid}
    assert TASK.reward(response, reference) == (agrees == 1)
    assert TASK.reward(response, reference, finished=False) == 0


def test_rows_that_no_verdict_fits_are_refused() -> None:
    prompt, reference = parts(ROWS[0])
    with pytest.raises(DataError, match="no verdict: 'C'"):
        TASK.score("A", "C")
    with pytest.raises(DataError, match="no judge's question"):
        TASK.group([Message(role="user", content="2 tabs po bid")])
    asked = read_question(prompt)
    wrong, right = (asked.second, asked.first) if reference.endswith("A") else (asked.first, asked.second)
    same = [Message(role="user", content=prompt[0].content.replace(wrong, right))]
    with pytest.raises(DataError, match="both answers are right"):
        TASK.slices(same, reference)


def test_unsafe_preferred_is_measured_where_a_near_miss_is_and_nowhere_else(
    tiny_model: Path, task: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    asked = examples(ROWS[:40])
    results = measure("baseline", tiny_model, TASK, asked, EvaluateSettings(max_new_tokens=2))
    for example, result in zip(asked, results, strict=True):
        near = "wrong=near_miss" in example.slices
        assert (result.scores["unsafe_preferred"] is not None) == near
    table = tabulate(results, TASK.metrics, 0.95)
    assert table["agreement"]["n"] == 40
    assert table["consistency"]["n"] == 20
    assert 0 < table["unsafe_preferred"]["n"] == sum("wrong=near_miss" in one.slices for one in asked) < 40


def pair(group: str, agreement: tuple[float, float], valid: tuple[float, float] = (1, 1)) -> list[Result]:
    return [
        Result(
            arm="sft",
            example_id=f"{group}{place}",
            group=group,
            response="",
            slices=[],
            scores={"agreement": agreement[place], "valid": valid[place]},
        )
        for place in (0, 1)
    ]


def test_consistency_by_hand() -> None:
    """Right in both orders or wrong in both is one verdict; right once is a liking for a position."""
    rows = [
        *pair("a", (1, 1)),
        *pair("b", (0, 0)),
        *pair("c", (1, 0)),
        *pair("d", (0, 0), (0, 1)),
        pair("e", (1, 1))[0],
    ]
    found = swap_consistency(rows, "agreement", 0.95)
    assert found is not None
    assert (found.mean, found.n) == (0.5, 4)
    assert found.low < 0.2 < 0.8 < found.high
    assert swap_consistency(rows[-1:], "agreement", 0.95) is None
    assert CONSISTENCY in TASK.metrics


def test_the_recipe_asks_the_gate_for_more_than_the_prompted_judge_can() -> None:
    metrics = {metric.name for metric in TASK.metrics}
    assert {criterion.metric for criterion in RECIPE.gate.criteria} <= metrics
    agreement = next(criterion for criterion in RECIPE.gate.criteria if criterion.metric == "agreement")
    assert (agreement.tier, agreement.test) == ("primary", "superiority")
    assert {"champion", "baseline", "few_shot"} == set(agreement.versus)
    assert RECIPE.evaluate.few_shot
    assert not RECIPE.evaluate.max_rows  # a limit by the hash of rows would part pairs
