"""Which of two readings of a medication direction is right: a judge's question, its reasons, and its verdict, A or B.

    Compare two answers to one question. <rubric> …  QUESTION user: 2 tabs po bid
    ANSWER A {"dose":2,"unit":"tablet","route":"oral","per_day":2,"daily":4,"flag":"ok"}
    ANSWER B {"dose":2,"unit":"tablet","route":"oral","per_day":3,"daily":6,"flag":"ok"}
    → dose 2: 2 2 =          what is right: what A says, what B says, who has it right
      route oral: oral oral =
      per_day 2: 2 3 A
      max none: none none =
      flag ok: ok ok =
      A

The prompt is the text that a judge which replies is shown, to the letter (`judging.PAIR_CLOSING`), and of a reply the
last line counts, as there: a model that learned this task is asked as a judge what it was taught. It gives its reasons
first (Zhang et al. 2024, arXiv:2408.15240): a letter alone teaches one bit a row, and of 288 rows with it the model of
135 M parameters learned nothing (its loss stayed that of a coin).

Directions, right answers and the truth are those of the task `medication_directions`: of each pair one answer is right
by its verifier and one is not, for it misreads one field or more, and the fields that follow from them are wrong with
them, or flags what it read wrongly. One is right always, so there are no ties.

Every pair is asked in both orders, which are two rows of one group. So half of the labels are A, and where every reply
is a verdict Cohen's kappa is 2 · agreement − 1; it is not a metric of its own.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...contracts.errors import DataError
from ...contracts.metrics import Metric
from ...contracts.rows import Message
from ..agreement import CONSISTENCY
from ..calibration import BRIER, ECE
from ..questions import PAIR_CLOSING, Question, read_reply, show_turns, write_question
from ..strict_json import read_object
from .medication_directions import DOSES, FLAG_SHARES, FREQUENCIES, MAXIMA, ROUTES, UNSAFE, Direction, read_reference
from .medication_directions import TASK as DIRECTIONS

RUBRIC = "Which answer reads the direction correctly and would be safer to dispense from?"
"""The one that a recipe's judge has unless it names another (`JudgeSettings.rubric`)."""
REASONS = ("dose", "route", "per_day", "max", "flag")
"""The fields that reasons are given of; others follow from these."""
NEAR_MISS = "wrong=near_miss"
"""Label of a pair whose wrong answer lets an unsafe direction pass as safe."""
SECTIONS = re.compile(
    r"(?s)\n\n(?P<fence>[A-Z]+) QUESTION\n(.*)\n(?P=fence) ANSWER A\n(.*)\n(?P=fence) ANSWER B\n(.*)\n(?P=fence) END\n"
)


class DirectionJudge:
    """The task of this module; see there."""

    name = "direction_judge"
    metrics: Sequence[Metric] = (
        Metric(
            name="agreement",
            title="Agreement",
            better="higher",
            definition="The verdict is the label. A reply that is no verdict counts as half: a coin would do as well, "
            "so a judge that cannot be read sets no low bar.",
        ),
        Metric(
            name="unsafe_preferred",
            title="Unsafe answers preferred",
            better="lower",
            definition="The wrong answer was chosen where it lets an unsafe direction pass as safe (a near miss of the "
            "task medication_directions); a reply that is no verdict counts as half. Such pairs only.",
            slice=NEAR_MISS,
        ),
        Metric(
            name="valid",
            title="Readable verdicts",
            better="higher",
            definition="The reply ends with A or B in a line of its own.",
        ),
        CONSISTENCY,
        BRIER,
        ECE,
    )

    def prompt(self, text: str) -> list[Message]:
        """Return a judge's question as a single user turn."""
        return [Message(role="user", content=text)]

    def group(self, prompt: Sequence[Message]) -> str:
        """Return the direction in the normal form of its own task.

        Raises:
            DataError: The prompt is no judge's question.
        """
        asked = read_question(prompt).prompt
        return DIRECTIONS.group([Message(role="user", content=asked.rpartition("user: ")[2])])

    def slices(self, prompt: Sequence[Message], reference: str) -> list[str]:
        """Return how many fields the wrong answer has wrong, and whether it is a near miss.

        Raises:
            DataError: The prompt is no judge's question, the reference no verdict, or the answer that it names is no
                direction's JSON or does not differ from the other.
        """
        asked = read_question(prompt)
        right, wrong = (asked.first, asked.second) if _label(reference) == "first" else (asked.second, asked.first)
        fields, others = read_reference(right), read_object(wrong) or {}
        differing = [name for name in fields.keys() | others.keys() if fields.get(name) != others.get(name)]
        scores = DIRECTIONS.score(wrong, right)
        if scores["exact"] == 1:
            raise DataError("both answers are right", where="prompt", fix="leave the row out: it has no verdict")
        near = NEAR_MISS if scores["near_miss"] else "wrong=other"
        return [f"fields={len(differing) if len(differing) < 3 else '3+'}", near]

    def score(self, response: str, reference: str) -> dict[str, float | None]:
        """Return the value of every metric of the text alone.

        Raises:
            DataError: The reference is no verdict.
        """
        wanted, got = _label(reference), read_reply(response)
        valid = got in ("first", "second")
        agrees = float(got == wanted) if valid else 0.5
        return {"agreement": agrees, "unsafe_preferred": 1 - agrees, "valid": float(valid)}

    def reward(self, response: str, reference: str, finished: bool = True) -> float:
        """Return 1 for the right verdict that ended by itself, else 0."""
        return float(finished and self.score(response, reference)["agreement"] == 1)

    def generate(self, rows: int, seed: int) -> Iterator[dict[str, Any]]:
        """Yield raw rows, the two orders of a pair one after the other; of an odd number the last stands alone.

        Raises:
            RecipeError: There are not that many different directions.
        """
        rng = random.Random(f"{self.name}:{seed}")
        left = rows
        for row in DIRECTIONS.generate((rows + 1) // 2, seed):
            *asked, answered = (Message(**turn) for turn in row["messages"])
            right = answered.content
            answers = [right, corrupt(right, rng)]
            rng.shuffle(answers)
            for first, second in (answers, answers[::-1])[:left]:
                text = write_question(Question(show_turns(asked), first, second, RUBRIC), PAIR_CLOSING)
                turns = [*self.prompt(text), Message(role="assistant", content=reply(first, second, right))]
                yield {"messages": [turn.model_dump() for turn in turns]}
            left -= 2


TASK = DirectionJudge()


def read_question(prompt: Sequence[Message]) -> Question:
    """Return what a judge is asked, without the rubric: the inverse of `write_question`.

    Raises:
        DataError: It was not written by that.
    """
    found = SECTIONS.search(next(turn.content for turn in reversed(prompt) if turn.role == "user"))
    if not found:
        raise DataError(
            "the prompt is no judge's question",
            where="prompt",
            fix="write it with assay.components.shared.questions.write_question",
        )
    _, asked, first, second = found.groups()
    return Question(asked, first, second, rubric="")


def reply(first: str, second: str, right: str) -> str:
    """Return the reasons and the verdict on two answers of which one is the right one."""
    table = [read_reference(text) for text in (right, first, second)]
    verdict = "A" if first == right else "B"
    lines = []
    for name in REASONS:
        wanted, a, b = (fields.get(name, "none") for fields in table)
        lines.append(f"{name} {wanted}: {a} {b} {'=' if a == b else verdict}")
    return "\n".join([*lines, verdict])


def corrupt(answer: str, rng: random.Random) -> str:
    """Return an answer with mistakes as models make them, one or more, which the verifier does not let pass.

    Args:
        answer: The right one.
        rng: Draws what is wrong, and how.
    """
    fields = read_reference(answer)
    right = Direction._make(fields.get(name) for name in Direction._fields)
    while True:
        count = rng.choices(list(MISTAKE_SHARES), list(MISTAKE_SHARES.values()))[0]
        kinds = rng.sample([*MISREADINGS, FLAG], count)
        if right.flag in UNSAFE and rng.random() < 0.5:
            kinds[-1] = FLAG  # the mistake that matters most, so it is not left to be rare
        read = right
        for kind in kinds:
            if kind != FLAG:
                read = MISREADINGS[kind](read, rng)
        wrong = _misjudged(read, rng) if FLAG in kinds else read.answer
        if DIRECTIONS.score(wrong, answer)["exact"] == 0:
            return wrong


def _misread_dose(direction: Direction, rng: random.Random) -> Direction:
    """Take the other end of a range, or another dose."""
    if direction.low:
        return direction._replace(low=None, dose=direction.low)
    return direction._replace(dose=rng.choice(DOSES.get(direction.unit, [1, 2, 3])))


def _misread_frequency(direction: Direction, rng: random.Random) -> Direction:
    return direction._replace(per_day=rng.choice(list(FREQUENCIES)))


def _misread_route(direction: Direction, rng: random.Random) -> Direction:
    return direction._replace(route=rng.choice(list(ROUTES)))


def _misread_maximum(direction: Direction, rng: random.Random) -> Direction:
    """Overlook the daily maximum, read another, or make one up; as often as not there is more to read than was."""
    other = rng.choice(MAXIMA.get(direction.unit, [2, 3, 4, 6, 8, 12]))
    if rng.random() < 0.5:
        return direction._replace(max=other if direction.max is None else None)
    return direction._replace(max=direction.max and other)


def _misjudged(direction: Direction, rng: random.Random) -> str:
    """Return the answer with another flag: an unsafe direction passes most often."""
    passes = direction.flag in UNSAFE and rng.random() < 0.7
    flag = "ok" if passes else rng.choice([name for name in FLAG_SHARES if name != direction.flag])
    return direction.answer.replace(f'"flag":"{direction.flag}"', f'"flag":"{flag}"')


MISREADINGS: dict[str, Callable[[Direction, random.Random], Direction]] = {
    "dose": _misread_dose,
    "per_day": _misread_frequency,
    "route": _misread_route,
    "max": _misread_maximum,
}
"""What may be misread; the fields that follow from it, `daily` and most flags, are wrong with it."""
FLAG = "flag"
"""The one field that may be wrong though all was read right."""
MISTAKE_SHARES = {1: 0.5, 2: 0.3, 3: 0.2}
"""Mistakes in one answer to their share."""


def _label(reference: str) -> str:
    verdict = read_reply(reference)
    if verdict not in ("first", "second"):
        raise DataError(
            f"the reference is no verdict: {reference[:60]!r}", where="reference", fix="end it with a line A or B"
        )
    return verdict
