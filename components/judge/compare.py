"""Two arms side by side before a judge, and how far the judge can be believed.

Every pair is shown twice, with the answers swapped. A judge that names the same position twice has said nothing about
the answers: that is a tie, and it counts against the judge where the verifier knows which answer is right.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..contracts.artifacts import digest_of, write_atomically
from ..contracts.errors import DataError
from ..contracts.metrics import Summary
from ..contracts.recipe import JudgeSettings
from ..contracts.rows import Example, Result, Verdict
from ..runtime.context import progress, work_folder
from ..shared.judging import Choice, Judge, Question, show_turns
from ..shared.statistics import Interval, mean_interval, proportion
from ..shared.tasks.task import Task

CANDIDATE, REFERENCES = "candidate", ("champion", "baseline")
BATCH = 16
"""Questions per call of the judge; what is judged is kept after each."""

Side = Literal["a", "b", "tie"]
Said = Literal["a", "b", "tie", "unparsed"]


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


def compare(pairs: Sequence[Pair], judge: Judge, task: Task, rubric: str) -> list[Verdict]:
    """Return a verdict per pair, in order. Equal answers are ties without asking."""
    asked = [pair for pair in pairs if not pair.equal]
    questions = [question for pair in asked for question in both_orders(pair, rubric)]
    choices = iter(ask(judge, questions))
    verdicts = []
    for pair in pairs:
        first, swapped = ("tie", "tie") if pair.equal else (next(choices), next(choices))
        verdicts.append(_verdict(pair, _by_arm(first, "a", "b"), _by_arm(swapped, "b", "a"), label(pair, task)))
    return verdicts


def both_orders(pair: Pair, rubric: str) -> tuple[Question, Question]:
    """Return the question with arm a shown first, and the one with arm b shown first."""
    text = show_turns(pair.example.prompt)
    a, b = pair.a.response, pair.b.response
    return Question(text, first=a, second=b, rubric=rubric), Question(text, first=b, second=a, rubric=rubric)


def ask(judge: Judge, questions: Sequence[Question]) -> list[Choice | None]:
    """Ask batch by batch, report progress, and keep what was said: a killed step asks only what it does not know."""
    path = work_folder() / "choices.json"
    kept: dict[str, list[Choice | None]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    choices: list[Choice | None] = []
    for start in range(0, len(questions), BATCH):
        batch = questions[start : start + BATCH]
        key = digest_of([judge.identity, *map(asdict, batch)])
        if key not in kept:
            kept[key] = judge.compare(batch)
            write_atomically(path, json.dumps(kept))
        choices += kept[key]
        progress(len(choices), len(questions), "comparisons")
    return choices


def label(pair: Pair, task: Task) -> Side:
    """Return which arm the verifier says is better: by the task's primary metric, or where it does not apply, reward.

    Two answers that are both wrong are a tie: the label says who is right, not who is nearer.
    """
    metric = task.metrics[0]
    a, b = pair.a.scores.get(metric.name), pair.b.scores.get(metric.name)
    sign = 1 if metric.better == "higher" else -1
    if a is None or b is None:
        reference, sign = pair.example.reference, 1
        a, b = task.reward(pair.a.response, reference), task.reward(pair.b.response, reference)
    if a == b:
        return "tie"
    return "a" if sign * (a - b) > 0 else "b"


def summarise(
    verdicts: Sequence[Verdict], equal: int, arms: tuple[str, str], settings: JudgeSettings, confidence: float = 0.95
) -> Summary:
    """Return the table of the report, and whether the judge may decide anything.

    Args:
        verdicts: All of them; unparsed ones count as ties, and against the judge.
        equal: Pairs whose answers were the same text, so that nobody was asked.
        arms: Arm a and arm b.
        settings: The floor, the rubric and the backend.
        confidence: Of the intervals.
    """
    winners = Counter(verdict.winner for verdict in verdicts)
    points = [{"a": 1.0, "tie": 0.5, "b": 0.0}[verdict.winner] for verdict in verdicts]
    win_rate = mean_interval(points, confidence) if points else None
    agreement, asked = agree(verdicts, confidence), len(verdicts) - equal
    consistent = sum(verdict.first == verdict.swapped != "unparsed" for verdict in verdicts) - equal
    unparsed = sum("unparsed" in (verdict.first, verdict.swapped) for verdict in verdicts)
    may_decide = agreement is not None and agreement.low >= settings.min_agreement
    details: dict[str, Any] = {
        "compared": list(arms),
        "n": len(verdicts),
        "wins": winners["a"],
        "losses": winners["b"],
        "ties": winners["tie"],
        "unparsed": unparsed,
        "asked": asked,
        "equal_answers": equal,
        "win_rate": _cell(win_rate),
        "swap_consistency": consistent / asked if asked else None,
        "agreement": _cell(agreement),
        "floor": settings.min_agreement,
        "may_decide": may_decide,
        "rubric": settings.rubric,
        "backend": settings.backend,
    }
    known = {
        "win_rate": win_rate.mean if win_rate else None,
        "swap_consistency": details["swap_consistency"],
        "agreement": agreement.mean if agreement else None,
        "agreement_low": agreement.low if agreement else None,
        **{name: float(details[name]) for name in ("n", "unparsed", "equal_answers", "may_decide")},
    }
    metrics = {name: value for name, value in known.items() if value is not None}
    return Summary(step="judge", headline=_headline(details), metrics=metrics, details=details)


def agree(verdicts: Sequence[Verdict], confidence: float) -> Interval | None:
    """Return the share of examples with a better answer on which the judge, in both orders, named it; None for none."""
    labelled = [verdict for verdict in verdicts if verdict.label in ("a", "b")]
    if not labelled:
        return None
    right = sum(verdict.winner == verdict.label for verdict in labelled)
    return proportion(right, len(labelled), confidence)


def _cell(interval: Interval | None) -> dict[str, float | None]:
    """Return a cell of the table; a share of nothing has no mean."""
    return interval.model_dump() if interval else {"mean": None, "low": 0.0, "high": 1.0, "n": 0}


def _verdict(pair: Pair, first: Said, swapped: Said, labelled: Side) -> Verdict:
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
    )


def _by_arm(choice: str | None, first: Side, second: Side) -> Said:
    """Return the arm that stands at the chosen position."""
    said: dict[str | None, Said] = {"first": first, "second": second, "tie": "tie", None: "unparsed"}
    return said[choice]


def _headline(details: dict[str, Any]) -> str:
    if details["backend"] == "none":
        return "No judge was asked (backend none), so none may decide."
    a, b = details["compared"]
    agreement, rate = details["agreement"], details["win_rate"]
    told = (
        f"The judge prefers {a} to {b} on {details['wins']} of {details['n']} examples, {b} on {details['losses']}, "
        f"{details['ties']} ties ({details['equal_answers']} of them equal answers, {details['unparsed']} unparsed): "
        f"win rate {rate['mean']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]."
    )
    if not agreement["n"]:
        return f"{told} No example has a labelled winner, so it may not decide."
    verb = "may" if details["may_decide"] else "may not"
    return (
        f"{told} It agrees with the verifier on {agreement['mean']:.2f} [{agreement['low']:.2f}, "
        f"{agreement['high']:.2f}] of {agreement['n']} (floor {details['floor']:.2f}): it {verb} decide."
    )
