"""The gate: promote, hold, or inconclusive, from paired results on held-out examples.

Each criterion is a one-sided test at α against a reference: another arm on the same examples, or a bound that the
candidate's own mean must keep (the reference of a first model may be so bad at safety that to beat it says nothing).
All `critical` and `primary` ones must pass, so the chance to promote a model that fails any of them is at most α
without a correction (an intersection–union test, Berger 1982). `supporting` ones decide nothing; as they are read side
by side, they pass by Holm's procedure. α is for all decisions on the same held-out examples together: each is taken at
its own level, see `looks.py`.

Slices turn the burden of proof around: one holds a candidate only where it is *shown* to be worse by more than the
margin, by Holm's procedure over all slices at α. To ask of each slice that it be shown no worse would block nearly
every candidate, for a slice is small; to go by its mean would, too: of 20 slices of 30 examples each, with nothing
changed at all, nearly always one falls by five points or more. So a slice that is too small to tell lets pass, and what
it cannot rule out is in the table. Slices can only hold, never promote, so they raise no rate of false promotions.

* **promote**       all of them pass.
* **hold**          one shows the opposite: the whole interval of the difference lies at or below the bar, which is the
                    least gain (superiority, 0 unless a margin is set), −margin (non-inferiority) or 0 (on the wrong
                    side of a bound); or a slice is shown to be worse; or the candidate's bytes are those of what it
                    should replace.
* **inconclusive**  neither, or fewer examples than `min_examples`, or no α left for these examples; `needed` says how
                    many examples in all would pass at the observed effect, and is None where more of the same would
                    not help.
"""

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ..contracts.artifacts import Manifest, read_manifest, seal, write_atomically
from ..contracts.errors import DataError, RecipeError
from ..contracts.metrics import Metric, Summary
from ..contracts.recipe import Criterion, GateSettings, SliceRule
from ..contracts.rows import Result, Verdict, read_rows
from ..shared.looks import HeldOut, Looks, level
from ..shared.prediction import corrected_win_rate
from ..shared.statistics import (
    Counts,
    Floats,
    Interval,
    bound_test,
    holm,
    mcnemar,
    paired_test,
    proportion,
    summarise,
)
from ..shared.summary import read_summary, write_summary
from ..shared.tasks.task import get_task

CANDIDATE = "candidate"
BENCHMARKS = "benchmarks"
ABSOLUTE = "absolute"
JUDGE_METRIC = "judge_win_rate"
ASKED = ("baseline", CANDIDATE, "champion")
"""Arms of which benchmarks are asked."""
Arms = dict[str, list[Result]]


class Scores(NamedTuple):
    """What the arms scored, by column: all that a decision rests on."""

    arms: Mapping[str, Mapping[str, Floats]]
    """By arm and metric, one value per example in one order; NaN where the metric does not apply."""
    groups: Sequence[str] | None = None
    """Of each example; None where each is its own."""
    slices: Mapping[str, NDArray[np.intp]] = {}
    """By label, `name=value`: places of its examples."""

    @classmethod
    def of(cls, arms: Arms, metrics: Sequence[Metric]) -> "Scores":
        """Return the columns of arms that answered the same examples in the same order."""
        groups = [row.group for row in arms[CANDIDATE]]
        slices: defaultdict[str, list[int]] = defaultdict(list)
        for place, row in enumerate(arms[CANDIDATE]):
            for label in row.slices:
                slices[label].append(place)
        return cls(
            arms={
                arm: {
                    metric.name: np.asarray([row.scores.get(metric.name) for row in rows], dtype=np.float64)
                    for metric in metrics
                }
                for arm, rows in arms.items()
            },
            groups=None if len(set(groups)) == len(groups) else groups,
            slices={label: np.asarray(places) for label, places in sorted(slices.items())},
        )


class Benchmarks(NamedTuple):
    """What the arms scored beside the task."""

    metrics: list[Metric]
    arms: Arms
    scores: Scores


class Finding(BaseModel):
    """One criterion against one reference."""

    model_config = ConfigDict(frozen=True)

    metric: str
    tier: str
    versus: str
    test: str
    margin: float
    n: int
    candidate: float
    reference: float
    """Mean of the other arm, or the bound."""
    difference: float
    """Positive: the candidate is better, whichever way the metric points."""
    low: float
    high: float
    p_value: float
    alpha: float
    passed: bool | None
    needed: int | None
    """Held-out examples in all, those to which the metric does not apply among them."""
    note: str = ""
    """Why the numbers could not decide, where it is not they that are too few."""
    slice: str = ""
    """Label of the slice that is compared; empty for all examples. A slice's p-value is against "not worse, by the
    margin"."""


class Decision(BaseModel):
    """What the gate says, before the digests are added."""

    model_config = ConfigDict(frozen=True)

    decision: str
    reason: str
    needed: int | None


class Turn(NamedTuple):
    """Which decision on these held-out examples this is."""

    number: int
    """1 for the first."""
    level: float
    """Its part of α; 0 when there is none left."""


def run(settings: GateSettings, task: str, given: Mapping[str, str], output: str, summary: Any) -> bool:
    """Decide on artifacts, write the record, and return whether it is `promote`.

    Args:
        settings: The policy.
        task: Name of the task.
        given: Folders of `results`, `verdicts`, `judging` and `looks`; and of `benchmarks`, where there are any.
        output: Folder of the decision.
        summary: The artifact of the decision as scalars.
    """
    started = time.monotonic()
    kinds = {"results": "results", "verdicts": "verdicts", "judging": "summary", "looks": "looks"}
    kinds |= {BENCHMARKS: BENCHMARKS} if BENCHMARKS in given else {}
    parents = {name: read_manifest(given[name], kind) for name, kind in kinds.items()}
    metrics = get_task(task).metrics
    arms = group_by_arm(read_rows(Path(given["results"]) / "results.parquet", Result))
    digests = check_arms(arms, parents["results"].metadata.get("arms", {}))
    held_out = HeldOut.of(row.example_id for row in arms[CANDIDATE])
    looks = Looks.model_validate_json((Path(given["looks"]) / "looks.json").read_bytes())
    turn = turn_of(settings, looks, held_out)
    # Without any α left nothing is promoted; what is worse can still be shown, at the policy's own level.
    spent = settings.model_copy(update={"alpha": turn.level or settings.alpha})
    judge = read_summary(given["judging"]).details
    scores = Scores.of(arms, metrics)
    beside = read_benchmarks(given[BENCHMARKS], parents[BENCHMARKS], digests) if BENCHMARKS in given else None
    findings = [
        *findings_of(spent, metrics, scores, beside),
        *judged(spent, judge, read_rows(Path(given["verdicts"]) / "verdicts.parquet", Verdict)),
    ]
    slices = slices_of(settings, metrics, scores)
    every = [*metrics, *(beside.metrics if beside else [])]
    decided = decide(settings, [*findings, *slices], digests, len(arms[CANDIDATE]), every, turn)
    record = {
        "schema": 1,
        **decided.model_dump(),
        "candidate": digests[CANDIDATE],
        "champion": digests.get("champion"),
        "baseline": digests["baseline"],
        "examples": len(arms[CANDIDATE]),
        "held_out": held_out.model_dump(),
        "measurement": looks.measurement,
        "look": turn.number,
        "level": turn.level,
        "alpha": settings.alpha,
        "criteria": [finding.model_dump() for finding in findings],
        "slices": [finding.model_dump() for finding in slices],
        "judge": judge,
        "arms": {arm: table(rows, metrics) for arm, rows in arms.items()},
        "benchmarks": {arm: table(rows, beside.metrics) for arm, rows in beside.arms.items()} if beside else {},
        "policy": settings.model_dump(mode="json"),
    }
    write_atomically(Path(output) / "decision.json", json.dumps(record, indent=1, sort_keys=True) + "\n")
    seal(output, "decision", parents=parents)
    promoted = decided.decision == "promote"
    told = Summary(
        step="gate",
        headline=decided.reason,
        metrics={"promoted": float(promoted), "examples": float(held_out.examples), "look": float(turn.number)},
        details={"decision": decided.decision},
    )
    write_summary(summary, told, seconds=time.monotonic() - started, parents=parents)
    return promoted


def read_benchmarks(folder: str | Path, manifest: Manifest, digests: Mapping[str, str]) -> Benchmarks:
    """Return what the compared models scored on benchmarks.

    Raises:
        DataError: They were asked of other models than were measured on the held-out rows.
    """
    asked = manifest.metadata.get("arms", {})
    if asked != {arm: digest for arm, digest in digests.items() if arm in ASKED}:
        raise DataError(
            "the benchmarks were asked of other models than were measured on the held-out rows",
            where="benchmarks",
            fix="run benchmark and evaluate again on the same models",
        )
    metrics = [Metric.model_validate(one) for one in json.loads((Path(folder) / "metrics.json").read_bytes())]
    arms = group_by_arm(read_rows(Path(folder) / "results.parquet", Result))
    return Benchmarks(metrics, arms, Scores.of(arms, metrics))


def turn_of(settings: GateSettings, looks: Looks, held_out: HeldOut) -> Turn:
    """Return which decision on these examples this is, and its level.

    Raises:
        DataError: The looks were counted for other examples, and an earlier decision could so go uncounted.
    """
    if looks.held_out != held_out:
        raise DataError(
            "the looks were counted for other examples than were measured",
            where="looks.json",
            fix="run find_champion and the evaluation on the same splits, with the same evaluate.max_rows",
        )
    promoted = [look.promoted for look in looks.earlier]
    return Turn(len(promoted) + 1, level(settings.alpha, settings.looks, promoted))


def group_by_arm(rows: Sequence[Result]) -> Arms:
    """Return the results by arm, each in the order of the example ids.

    Raises:
        DataError: The baseline or the candidate is missing, an arm answered an example twice, or two arms were
            measured on different examples.
    """
    arms: defaultdict[str, list[Result]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.example_id):
        arms[row.arm].append(row)
    for needed in ("baseline", CANDIDATE):
        if needed not in arms:
            raise DataError(f"the arm {needed!r} was not measured", where="results.parquet", fix="run evaluate again")
    wanted = [row.example_id for row in arms[CANDIDATE]]
    for one, other in zip(wanted, wanted[1:], strict=False):
        if one == other:
            raise DataError(f"example {one} was measured twice", where="results.parquet", fix="run evaluate again")
    for arm, found in arms.items():
        if [row.example_id for row in found] != wanted:
            raise DataError(
                f"the arm {arm!r} was not measured on the same examples as the candidate "
                f"({len(found)} and {len(wanted)}), so nothing can be compared",
                where="results.parquet",
                fix="run evaluate again on one held-out set",
            )
    return dict(arms)


def check_arms(arms: Arms, digests: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of the models, which are of exactly the arms that were measured.

    Raises:
        DataError: A model has no results, or results have no model; a champion could so escape the comparison.
    """
    for arm in sorted(arms.keys() ^ digests.keys()):
        lack = "has results, but the manifest names no model for it" if arm in arms else "has no results"
        raise DataError(f"the arm {arm!r} {lack}", where="results", fix="run evaluate again")
    return dict(digests)


def findings_of(
    settings: GateSettings, metrics: Sequence[Metric], scores: Scores, benchmarks: Benchmarks | None = None
) -> list[Finding]:
    """Return every criterion against every reference that there is; without a champion its comparisons fall away.

    Args:
        settings: The policy.
        metrics: The task's.
        scores: On the held-out rows.
        benchmarks: Whose metrics may be criteria too.

    Raises:
        RecipeError: A criterion names a metric that there is not, or a bound that cannot be missed or kept.
    """
    of_task = {metric.name: metric for metric in metrics}
    of_benchmarks = {metric.name: metric for metric in benchmarks.metrics} if benchmarks else {}
    found = []
    for criterion in settings.criteria:
        metric = _metric(of_task | of_benchmarks, criterion.metric, "gate.criteria")
        asked = benchmarks.scores if benchmarks and criterion.metric not in of_task else scores
        if criterion.bound is not None and not metric.low < criterion.bound < metric.high:
            raise RecipeError(
                f"{metric.name} lies between {metric.low:g} and {metric.high:g}, so the bound {criterion.bound:g} "
                "asks for nothing or for the impossible",
                where="gate.criteria",
                fix="choose a bound between the two",
            )
        found += [
            _finding(criterion, metric, settings.alpha, asked, versus)
            for versus in criterion.versus
            if versus == ABSOLUTE or versus in asked.arms
        ]
    found = [_of_benchmark(one) if one.metric in of_benchmarks.keys() - of_task.keys() else one for one in found]
    return _corrected(found, settings.alpha)


def _of_benchmark(finding: Finding) -> Finding:
    """Take back the number of held-out rows that it would take: it is questions of the benchmark that are too few."""
    few = "the benchmark's questions are too few to tell, and `benchmarks.limit` sets how many there are"
    note = few if finding.passed is None and not finding.note else finding.note
    return finding.model_copy(update={"needed": None, "note": note})


def _metric(by_name: Mapping[str, Metric], name: str, where: str) -> Metric:
    if name not in by_name:
        raise RecipeError(f"there is no metric {name!r}", where=where, fix=f"choose one of {list(by_name)}")
    return by_name[name]


def _corrected(findings: Sequence[Finding], alpha: float) -> list[Finding]:
    """Take back what the supporting findings show one by one but not, by Holm's procedure, together."""
    shown = iter(holm([finding.p_value for finding in findings if finding.tier == "supporting"], alpha))
    kept = []
    for finding in findings:
        lost = finding.tier == "supporting" and not next(shown) and finding.passed
        kept.append(finding.model_copy(update={"passed": None}) if lost else finding)
    return kept


def _finding(criterion: Criterion, metric: Metric, alpha: float, scores: Scores, versus: str) -> Finding:
    candidate = scores.arms[CANDIDATE][metric.name]
    given: dict[str, Any] = {"better": metric.better, "alpha": alpha, "low": metric.low, "high": metric.high}
    bound = criterion.bound if versus == ABSOLUTE else None
    if bound is not None:
        tested = bound_test(candidate, bound, clusters=scores.groups, **given)
    else:
        manner: dict[str, Any] = {"test": criterion.test, "margin": criterion.margin}
        tested = paired_test(candidate, scores.arms[versus][metric.name], clusters=scores.groups, **manner, **given)
    n = tested.difference.n
    return Finding(
        metric=criterion.metric,
        tier=criterion.tier,
        versus=versus,
        test=criterion.test if bound is None else "bound",
        margin=criterion.margin if bound is None else 0.0,
        n=n,
        candidate=tested.candidate,
        reference=tested.reference,
        difference=tested.difference.mean,
        low=tested.difference.low,
        high=tested.difference.high,
        p_value=tested.p_value,
        alpha=alpha,
        passed=tested.passed,
        needed=ceil(tested.needed * len(candidate) / n) if tested.needed else None,
        note="" if n else "it applies to no example",
    )


def slices_of(settings: GateSettings, metrics: Sequence[Metric], scores: Scores) -> list[Finding]:
    """Return every slice of the policy against every reference there is.

    `passed` is False where the slice is shown to be worse by more than the margin, True where it is by itself shown not
    to be, and None where it could be either, which blocks nothing. The level is the policy's α, however often these
    examples were asked about: to hold is the safe side.

    Raises:
        RecipeError: The policy names a metric or a slice that there is not.
    """
    by_name = {metric.name: metric for metric in metrics}
    names = sorted({label.partition("=")[0] for label in scores.slices})
    found = []
    for rule in settings.slices:
        metric = _metric(by_name, rule.metric, "gate.slices")
        if rule.by not in names:
            raise RecipeError(
                f"no held-out example has a slice {rule.by!r}", where="gate.slices", fix=f"choose one of {names}"
            )
        found += [
            _slice(rule, metric, settings.alpha, scores, label, versus)
            for versus in rule.versus
            if versus in scores.arms
            for label in scores.slices
            if label.partition("=")[0] == rule.by
        ]
    tested = [finding for finding in found if not finding.note]
    worse = iter(holm([finding.p_value for finding in tested], settings.alpha))
    return [
        finding.model_copy(update={"passed": False}) if not finding.note and next(worse) else finding
        for finding in found
    ]


def _slice(rule: SliceRule, metric: Metric, alpha: float, scores: Scores, label: str, versus: str) -> Finding:
    places = scores.slices[label]
    # The roles are exchanged: what is to be shown is that the reference is better, by more than the margin.
    tested = paired_test(
        scores.arms[versus][metric.name][places],
        scores.arms[CANDIDATE][metric.name][places],
        better=metric.better,
        test="superiority",
        margin=rule.margin,
        alpha=alpha,
        clusters=None if scores.groups is None else [scores.groups[place] for place in places],
        low=metric.low,
        high=metric.high,
    )
    n, loss = tested.difference.n, tested.difference
    few = f"{n} examples, and the policy asks for {rule.min_examples}" if n < rule.min_examples else ""
    return Finding(
        metric=rule.metric,
        tier="slice",
        versus=versus,
        test="non_inferiority",
        margin=rule.margin,
        n=n,
        candidate=tested.reference,
        reference=tested.candidate,
        difference=-loss.mean,
        low=-loss.high,
        high=-loss.low,
        p_value=tested.p_value,
        alpha=alpha,
        passed=True if -loss.high > -rule.margin and not few else None,
        needed=None,
        note=few,
        slice=label,
    )


def judged(settings: GateSettings, judge: dict[str, Any], verdicts: Sequence[Verdict]) -> list[Finding]:
    """Return the judge's criterion, if the policy wants one.

    Where labels exist, it is the win rate that they correct, a tie counted as half (`shared/prediction.py`): then what
    the judge gets wrong in one direction promotes nothing. Else it is its wins against its losses, ties left out (a
    sign test). A judge below its floor cannot decide: its criterion is then neither passed nor failed.
    """
    if not settings.judge_may_decide:
        return []
    corrected = corrected_win_rate(verdicts, 1 - 2 * settings.alpha)
    wins = sum(verdict.winner == "a" for verdict in verdicts)
    losses = sum(verdict.winner == "b" for verdict in verdicts)
    n = len(verdicts) if corrected else wins + losses
    alone = proportion(wins, n, 1 - 2 * settings.alpha) if n else Interval(mean=0.5, low=0, high=1, n=0)
    share = corrected or alone
    p_value = corrected.p_value if corrected else mcnemar(Counts(wins, losses, n))
    shown = True if p_value <= settings.alpha else False if share.high <= 0.5 else None
    return [
        Finding(
            metric=JUDGE_METRIC,
            tier="primary",
            versus=str(judge.get("compared", [CANDIDATE, "baseline"])[1]),
            test="superiority",
            margin=0.0,
            n=n,
            candidate=share.mean,
            reference=0.5,
            difference=share.mean - 0.5,
            low=share.low - 0.5,
            high=share.high - 0.5,
            p_value=p_value,
            alpha=settings.alpha,
            passed=shown if judge.get("may_decide") else None,
            needed=None,  # the judge sees `judge.max_examples` of the examples, so more examples are not more verdicts
            note=_judge_note(bool(judge.get("may_decide")), shown),
        )
    ]


def _judge_note(may_decide: bool, shown: bool | None) -> str:
    if not may_decide:
        return "the judge's agreement with the labels is below its floor"
    return "its verdicts are too few or too even; `judge.max_examples` sets how many there are" if shown is None else ""


def decide(
    settings: GateSettings,
    findings: Sequence[Finding],
    digests: dict[str, str],
    examples: int,
    metrics: Sequence[Metric],
    turn: Turn,
) -> Decision:
    """Return the decision with one sentence of why.

    Args:
        settings: The policy.
        findings: Of every criterion and every slice.
        digests: Content digest of each arm's model.
        examples: Held-out examples.
        metrics: The task's, for their titles and which way they are better.
        turn: Of this decision.
    """
    by_name = {metric.name: metric for metric in metrics}
    for arm in ("baseline", "champion"):
        if digests.get(arm) == digests[CANDIDATE]:
            return Decision(decision="hold", reason=f"Hold: the candidate is the {arm}, byte for byte.", needed=None)
    if examples < settings.min_examples:
        reason = f"Inconclusive: {examples} held-out examples, the policy asks for {settings.min_examples}."
        return Decision(decision="inconclusive", reason=reason, needed=settings.min_examples)
    required = [finding for finding in findings if finding.tier in ("critical", "primary")]
    if not required:
        reason = "Inconclusive: no criterion could be tested (no critical or primary one has a reference)."
        return Decision(decision="inconclusive", reason=reason, needed=None)
    required.sort(key=lambda finding: finding.tier != "critical")
    alone = "champion" not in digests and any("champion" in criterion.versus for criterion in settings.criteria)
    end = f" (decision {turn.number} on these examples, at level {turn.level:.2g})" if turn.number > 1 else ""
    end += "; there is no champion to compare with." if alone else "."
    failed = [
        finding for finding in [*required, *(one for one in findings if one.tier == "slice")] if finding.passed is False
    ]
    if failed:
        return Decision(decision="hold", reason=f"Hold: {_words(failed[0], by_name)}{end}", needed=None)
    if not turn.level:
        reason = (
            f"Inconclusive: {turn.number - 1} decisions were taken on these held-out examples, and the policy plans "
            f"for {settings.looks}; only fresh examples can tell."
        )
        return Decision(decision="inconclusive", reason=reason, needed=None)
    open_ = [finding for finding in required if finding.passed is None]
    if open_:
        return _left_open(open_, by_name, end)
    shown = next((finding for finding in required if finding.tier == "primary"), required[0])
    reason = f"Promote: {_words(shown, by_name)}; all {len(required)} required comparisons passed{end}"
    return Decision(decision="promote", reason=reason, needed=None)


def _left_open(findings: Sequence[Finding], metrics: Mapping[str, Metric], end: str) -> Decision:
    """Ask for more examples, unless there is a finding that more of the same would not close."""
    hopeless = [finding for finding in findings if finding.needed is None]
    needed = None if hopeless else max(finding.needed or 0 for finding in findings)
    told = hopeless[0] if hopeless else max(findings, key=lambda finding: finding.needed or 0)
    if told.note:
        more = f"; {told.note}"
    elif hopeless:
        more = "; more examples of this kind would not show it"
    else:
        more = f"; about {needed} examples in all would"
    return Decision(decision="inconclusive", reason=f"Inconclusive: {_words(told, metrics)}{more}{end}", needed=needed)


def _words(finding: Finding, metrics: Mapping[str, Metric]) -> str:
    metric = metrics.get(finding.metric)
    title = metric.title if metric else finding.metric.replace("_", " ")
    title += f" where {finding.slice}" if finding.slice else ""
    level = f"{100 * (1 - 2 * finding.alpha):.3g} % interval"
    if finding.test == "bound":
        lower = metric is not None and metric.better == "lower"
        ends = [finding.reference + (-end if lower else end) for end in (finding.low, finding.high)]
        shown = {True: "is shown to be", False: "is not", None: "is not shown to be"}[finding.passed]
        return (
            f"{title} {shown} {'below' if lower else 'above'} {finding.reference:g}: {finding.candidate:.3f} "
            f"({level} {min(ends):.3f} to {max(ends):.3f}, n = {finding.n})"
        )
    shown = {
        "superiority": {True: "better", False: "not better", None: "not shown to be better"},
        "non_inferiority": {True: "not worse", False: "worse", None: "not shown to be no worse"},
    }[finding.test][finding.passed]
    by = f" by more than {finding.margin:g}" if finding.margin else ""
    return (
        f"{title} is {shown}{by} than the {finding.versus}: {finding.candidate:.3f} against {finding.reference:.3f} "
        f"(improvement {finding.difference:+.3f}, {level} {finding.low:+.3f} to {finding.high:+.3f}, "
        f"n = {finding.n})"
    )


def table(rows: Sequence[Result], metrics: Sequence[Metric]) -> dict[str, dict[str, float | int]]:
    """Return mean and 95 % interval of every metric of one arm."""
    found = {}
    for metric in metrics:
        values = [value for row in rows if (value := row.scores.get(metric.name)) is not None]
        if values:
            found[metric.name] = summarise(values, metric).model_dump()
    return found
