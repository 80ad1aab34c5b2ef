"""Two arms side by side before one judge or several.

Every pair is shown twice, with the answers swapped. A judge that names the same position twice has said nothing about
the answers: that is a tie, and it counts against the judge where the label says which answer is better.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

from ..contracts.artifacts import digest_of, write_atomically
from ..contracts.errors import DataError
from ..contracts.rows import Example, Result, Verdict
from ..runtime.context import progress, work_folder
from ..shared.judging import Judge
from ..shared.questions import Answer, Question, show_turns
from ..shared.tasks.task import Task
from .labels import Known

CANDIDATE, REFERENCES = "candidate", ("champion", "baseline")
BATCH = 16
"""Questions per call of the judge; what is judged is kept after each."""

Side = Literal["a", "b", "tie"]
Said = Literal["a", "b", "tie", "unparsed"]
Q = TypeVar("Q", Question, Answer)
A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Pair:
    """The answers of two arms to one example."""

    example: Example
    a: Result
    b: Result

    @property
    def equal(self) -> bool:
        """There is nothing to judge."""
        return self.a.response == self.b.response


def choose_arms(results: Sequence[Result]) -> tuple[str, str]:
    """Return the candidate and what it is compared with: the champion, or the baseline if there is no champion.

    Raises:
        DataError: One of the two was not measured.
    """
    present = {result.arm for result in results}
    reference = next((arm for arm in REFERENCES if arm in present), None)
    if CANDIDATE not in present or reference is None:
        raise DataError(
            f"the results have the arms {sorted(present)}; the judge compares the candidate with champion or baseline",
            where="results.parquet",
            fix="run the evaluation again",
        )
    return CANDIDATE, reference


def pair_up(results: Sequence[Result], examples: Sequence[Example], arms: tuple[str, str], most: int) -> list[Pair]:
    """Return the answers of both arms to at most `most` examples, chosen by the hash of their id.

    Raises:
        DataError: The arms were not asked the same examples, or an example is not among the given ones.
    """
    a, b = ({result.example_id: result for result in results if result.arm == arm} for arm in arms)
    known = {example.id: example for example in examples}
    for example_id in sorted((a.keys() ^ b.keys()) | (a.keys() - known.keys())):
        where = "test.parquet" if example_id in a.keys() & b.keys() else f"results.parquet, {arms[0]} or {arms[1]}"
        raise DataError(f"example {example_id} is missing", where=where, fix="run the evaluation again")
    chosen = sorted(a, key=lambda example_id: hashlib.sha256(example_id.encode()).digest())[:most]
    return [Pair(known[example_id], a[example_id], b[example_id]) for example_id in chosen]


def compare(pairs: Sequence[Pair], judge: Judge, task: Task, rubric: str, labels: Known | None = None) -> list[Verdict]:
    """Return one judge's verdict per pair, in order. Equal answers are ties without asking.

    Args:
        pairs: What is compared.
        judge: Who is asked.
        task: Its verifier labels the better answer.
        rubric: The question, as text.
        labels: People's grades; where these are given, they label and the verifier does not.
    """
    asked = [pair for pair in pairs if not pair.equal]
    questions = [question for pair in asked for question in both_orders(pair, rubric)]
    choices = iter(ask(judge.identity, judge.compare, questions, "comparisons"))
    verdicts = []
    for pair in pairs:
        first, swapped = ("tie", "tie") if pair.equal else (next(choices), next(choices))
        verdicts.append(_verdict(pair, _by_arm(first, "a", "b"), _by_arm(swapped, "b", "a"), label(pair, task, labels)))
    return verdicts


def combine(panel: Sequence[Sequence[Verdict]]) -> list[Verdict]:
    """Return the verdicts of a panel: on each pair what more than half of its judges say, else a tie.

    Args:
        panel: Each judge's verdicts, of the same pairs in the same order; at least one judge.
    """
    return [
        each[0].model_copy(
            update={
                "winner": _majority([verdict.winner for verdict in each]),
                "first": _majority([verdict.first for verdict in each]),
                "swapped": _majority([verdict.swapped for verdict in each]),
                "votes": [verdict.winner for verdict in each],
            }
        )
        for each in zip(*panel, strict=True)
    ]


def both_orders(pair: Pair, rubric: str) -> tuple[Question, Question]:
    """Return the question with arm a shown first, and the one with arm b shown first."""
    text, a, b = show_turns(pair.example.prompt), pair.a.response, pair.b.response
    return Question(text, first=a, second=b, rubric=rubric), Question(text, first=b, second=a, rubric=rubric)


def ask(identity: str, answer: Callable[[Sequence[Q]], list[A]], questions: Sequence[Q], unit: str) -> list[A]:
    """Ask batch by batch, report progress, and keep what was said: a killed step asks only what it does not know.

    Args:
        identity: Of the judge.
        answer: The judge's method.
        questions: All of them.
        unit: What is counted, for the progress.
    """
    path = work_folder() / "choices.json"
    kept: dict[str, list[A]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    answers: list[A] = []
    for start in range(0, len(questions), BATCH):
        batch: Sequence[Q] = questions[start : start + BATCH]
        key = digest_of([identity, *(asdict(question) for question in batch)])
        if key not in kept:
            kept[key] = answer(batch)
            write_atomically(path, json.dumps(kept))
        answers += kept[key]
        progress(len(answers), len(questions), unit)
    return answers


def label(pair: Pair, task: Task, labels: Known | None = None) -> Side | None:
    """Return which arm's answer is better; None where people were asked, and not about both.

    Without people's grades the verifier says it: by the task's primary metric, or where it does not apply, reward. Two
    answers that are both wrong are a tie: the label says who is right, not who is nearer.
    """
    if labels is not None:
        ours, theirs = (labels.get((pair.example.id, result.response)) for result in (pair.a, pair.b))
        return None if ours is None or theirs is None else _side(ours, theirs)
    metric = task.metrics[0]
    a, b = pair.a.scores.get(metric.name), pair.b.scores.get(metric.name)
    sign = 1 if metric.better == "higher" else -1
    if a is None or b is None:
        reference, sign = pair.example.reference, 1
        a, b = task.reward(pair.a.response, reference), task.reward(pair.b.response, reference)
    return _side(sign * a, sign * b)


def _verdict(pair: Pair, first: Said, swapped: Said, labelled: Side | None) -> Verdict:
    winner: Side = "tie" if first != swapped or first == "unparsed" else first
    return Verdict(
        example_id=pair.example.id,
        group=pair.example.group,
        arm_a=pair.a.arm,
        arm_b=pair.b.arm,
        winner=winner,
        first=first,
        swapped=swapped,
        label=labelled,
        asked=not pair.equal,
        longer=_side(len(pair.a.response), len(pair.b.response)),
        votes=[winner],
    )


def _side(a: float, b: float) -> Side:
    return "tie" if a == b else "a" if a > b else "b"


def _by_arm(choice: str | None, first: Side, second: Side) -> Said:
    """Return the arm that stands at the chosen position."""
    said: dict[str | None, Said] = {"first": first, "second": second, "tie": "tie", None: "unparsed"}
    return said[choice]


def _majority(said: Sequence[Said]) -> Said:
    found, votes = Counter(said).most_common(1)[0]
    return found if 2 * votes > len(said) else "tie"
