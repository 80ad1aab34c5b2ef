"""Every arm's answers before one judge or several, each answer by itself: a grade from 1 to 5 by the rubric.

A reply without a grade is counted and left out: to call it a 3, or a 1, would make up an opinion.
"""

from collections.abc import Sequence
from statistics import mean, median
from typing import Literal

from ..contracts.rows import Example, Grade, Result
from ..shared.judging import Judge
from ..shared.questions import Answer, show_turns
from .compare import ask
from .labels import Known

TOGETHER = {"mean": mean, "median": median}


def grade(
    results: Sequence[Result],
    examples: Sequence[Example],
    judges: Sequence[Judge],
    rubric: str,
    aggregate: Literal["mean", "median"] = "mean",
    labels: Known | None = None,
) -> list[Grade]:
    """Return a grade of each arm's answer to each of some examples, by arm and then in the examples' order.

    Args:
        results: Of every arm; answers to other examples are left alone.
        examples: Those that are graded.
        judges: At least one.
        rubric: Text of what a good answer is.
        aggregate: How the grades of several judges become one.
        labels: People's grades.
    """
    by_arm: dict[str, dict[str, Result]] = {}
    for result in results:
        by_arm.setdefault(result.arm, {})[result.example_id] = result
    rows = [(example, found[example.id]) for found in by_arm.values() for example in examples if example.id in found]
    answers = [Answer(show_turns(example.prompt), result.response, rubric) for example, result in rows]
    distinct = list(dict.fromkeys(answers))  # arms that say the same are asked about once
    said = [dict(zip(distinct, ask(one.identity, one.grade, distinct, "grades"), strict=True)) for one in judges]
    graded = []
    for (example, result), answer in zip(rows, answers, strict=True):
        each = [known[answer] for known in said]
        told = [grade for grade in each if grade is not None]
        graded.append(
            Grade(
                arm=result.arm,
                example_id=example.id,
                group=example.group,
                grade=TOGETHER[aggregate](told) if told else None,
                grades=each,
                label=(labels or {}).get((example.id, result.response)),
            )
        )
    return graded
