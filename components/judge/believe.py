"""What the judge's verdicts and grades come to, and how far it can be believed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..contracts.metrics import Summary
from ..contracts.recipe import GRADES, JudgeSettings
from ..contracts.rows import Grade, Verdict
from ..shared.prediction import POINTS, corrected_win_rate, prediction_powered
from ..shared.questions import rubric_card
from ..shared.raters import cohens_kappa, krippendorff_alpha
from ..shared.statistics import Interval, mean_interval, paired_difference, proportion

LOW, HIGH = float(GRADES[0]), float(GRADES[-1])
SIDES = ("a", "b")


def summarise(
    verdicts: Sequence[Verdict],
    arms: tuple[str, str],
    settings: JudgeSettings,
    *,
    panel: Mapping[str, Sequence[Verdict]] | None = None,
    grades: Sequence[Grade] = (),
    labels: Mapping[str, float | None] | None = None,
    confidence: float = 0.95,
) -> Summary:
    """Return the table of the report, and whether the judge may decide anything.

    Args:
        verdicts: Of all judges together; unparsed ones count as ties, and against the judge.
        arms: Arm a and arm b.
        settings: The floor, the rubric and the backend.
        panel: Each judge's own verdicts, by its identity.
        grades: Of every arm; empty where the rubric has no scale.
        labels: How many grades people gave, and how far they agree; None where the verifier labels.
        confidence: Of the intervals.
    """
    winners = Counter(verdict.winner for verdict in verdicts)
    points = [POINTS[verdict.winner] for verdict in verdicts]
    told = reliability(verdicts, confidence)
    agreement = told["agreement"]
    may_decide = bool(agreement["n"]) and agreement["low"] >= settings.min_agreement
    details: dict[str, Any] = {
        "compared": list(arms),
        "n": len(verdicts),
        "wins": winners["a"],
        "losses": winners["b"],
        "ties": winners["tie"],
        "asked": sum(verdict.asked for verdict in verdicts),
        "equal_answers": sum(not verdict.asked for verdict in verdicts),
        "win_rate": cell(mean_interval(points, confidence) if points else None),
        "win_rate_corrected": cell(corrected_win_rate(verdicts, confidence)),
        **told,
        "floor": settings.min_agreement,
        "may_decide": may_decide,
        "rubric": rubric_card(settings.rubric) | {"text": _question(settings)},
        "backend": "panel" if settings.panel else settings.backend,
        "labels": labels or {},
        "judges": {identity: reliability(own, confidence) for identity, own in (panel or {}).items()},
        "alpha": _votes_alpha(verdicts),
        "grades": grading(grades, verdicts, arms, settings, confidence) if grades else {},
    }
    return Summary(step="judge", headline=_headline(details), metrics=_metrics(details), details=details)


def reliability(verdicts: Sequence[Verdict], confidence: float = 0.95) -> dict[str, Any]:
    """Return what speaks for and against believing some verdicts; pairs of equal answers are left out.

    `kappa` counts ties on both sides, `agreement` the pairs that have a better answer. `longer` is the share of winners
    that are the longer answer, `labels_longer` the same of the labels' winners: a judge may prefer length where it is
    right to. `first` is the share of single verdicts that name the position shown first; without a habit it is a half.
    """
    asked = [verdict for verdict in verdicts if verdict.asked]
    known = [verdict for verdict in asked if verdict.label]
    labelled = [verdict for verdict in known if verdict.label != "tie"]
    # What is said in each order, and what stood first there.
    shown = [*((one.first, "a") for one in asked), *((one.swapped, "b") for one in asked)]
    return {
        "swap_consistency": share([one.first == one.swapped != "unparsed" for one in asked], confidence),
        "agreement": share([one.winner == one.label for one in labelled], confidence),
        "kappa": cell(
            cohens_kappa([one.winner for one in known], [one.label for one in known], (*SIDES, "tie"), confidence),
            low=-1.0,
        ),
        "first": share([said == first for said, first in shown if said in SIDES], confidence),
        "longer": _longer(asked, [one.winner for one in asked], confidence),
        "labels_longer": _longer(asked, [one.label for one in asked], confidence),
        "abstained": sum(one.first == one.swapped == "tie" for one in asked),
        "unparsed": sum("unparsed" in (one.first, one.swapped) for one in asked),
    }


def grading(
    grades: Sequence[Grade],
    verdicts: Sequence[Verdict],
    arms: tuple[str, str],
    settings: JudgeSettings,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Return the mean grade of each arm, the paired difference of two, and whether grades agree with labels.

    Beside each number stands the same one corrected by people's grades, where there are any.

    Args:
        grades: Of every arm.
        verdicts: Hold the labels: which answer of the two arms is better.
        arms: Arm a and arm b.
        settings: The floor.
        confidence: Of the intervals.
    """
    by_arm: dict[str, dict[str, Grade]] = {}
    for row in grades:
        by_arm.setdefault(row.arm, {})[row.example_id] = row
    pairs = {key: (row, by_arm[arms[1]][key]) for key, row in by_arm[arms[0]].items() if key in by_arm[arms[1]]}
    labelled = [(verdict.label, *pairs[verdict.example_id]) for verdict in verdicts if verdict.label in SIDES]
    agreement = share([_better(a.grade, b.grade) == label for label, a, b in labelled], confidence)
    both = [(row.grade, row.label) for row in grades if row.grade and row.label]
    ours, theirs = [round(grade) for grade, _ in both], [round(label) for _, label in both]
    raters = zip(*(row.grades for row in grades), strict=True)
    return {
        "arms": {
            arm: _mean(list(rows.values()), confidence) | {"unparsed": sum(row.grade is None for row in rows.values())}
            for arm, rows in by_arm.items()
        },
        "compared": list(arms),
        "difference": _difference(list(pairs.values()), confidence),
        "agreement": agreement,
        "kappa": cell(cohens_kappa(ours, theirs, GRADES, confidence, weights="quadratic"), low=-1.0),
        "alpha": krippendorff_alpha([[one and round(one) for one in rater] for rater in raters]),
        "may_decide": bool(labelled) and agreement["low"] >= settings.min_agreement,
    }


def share(hits: Sequence[bool], confidence: float) -> dict[str, Any]:
    """Return a share with its interval, as a cell of the table."""
    return cell(proportion(sum(hits), len(hits), confidence) if hits else None)


def cell(interval: Interval | None, low: float = 0.0, high: float = 1.0) -> dict[str, Any]:
    """Return a cell of the table; what rests on nothing has no mean, and could lie anywhere."""
    return interval.model_dump() if interval else {"mean": None, "low": low, "high": high, "n": 0}


def _mean(rows: Sequence[Grade], confidence: float) -> dict[str, Any]:
    """Return the mean grade of one arm, and the one that people's grades correct."""
    told = [row for row in rows if row.grade is not None]
    # On a scale of 0 to 1, where two values at its ends are the shares that the statistics take them for.
    points, groups = [_point(row.grade) for row in told], [row.group for row in told]
    labels = [None if row.label is None else _point(row.label) for row in told]
    return _grade_cell(mean_interval(points, confidence, clusters=groups) if told else None) | {
        "corrected": _grade_cell(prediction_powered(labels, points, confidence, clusters=groups))
    }


def _difference(pairs: Sequence[tuple[Grade, Grade]], confidence: float) -> dict[str, Any]:
    """Return the mean paired difference of two arms' grades, and the one that people's grades correct."""
    told = [(a, b) for a, b in pairs if a.grade is not None and b.grade is not None]
    ones, others = [_point(a.grade) for a, _ in told], [_point(b.grade) for _, b in told]
    groups = [a.group for a, _ in told]
    labels = [None if a.label is None or b.label is None else _point(a.label) - _point(b.label) for a, b in told]
    gains = [one - other for one, other in zip(ones, others, strict=True)]
    raw = paired_difference(ones, others, confidence, clusters=groups) if told else None
    corrected = prediction_powered(labels, gains, confidence, clusters=groups, low=-1)
    return _grade_cell(raw, shift=0) | {"corrected": _grade_cell(corrected, shift=0)}


def _point(grade: float | None) -> float:
    return ((grade or LOW) - LOW) / (HIGH - LOW)


def _grade_cell(interval: Interval | None, shift: float = LOW) -> dict[str, Any]:
    """Return a cell of grades, or of their differences, from one of points between 0 and 1."""
    if interval is None:
        return cell(None, LOW if shift else LOW - HIGH, HIGH if shift else HIGH - LOW)
    ends = {name: shift + (HIGH - LOW) * getattr(interval, name) for name in ("mean", "low", "high")}
    return interval.model_dump(exclude={"p_value"}) | ends


def _longer(verdicts: Sequence[Verdict], winners: Sequence[str | None], confidence: float) -> dict[str, Any]:
    """Return the share of winners that are the longer answer, of those where one is longer."""
    told = zip(verdicts, winners, strict=True)
    return share([winner == one.longer for one, winner in told if winner in SIDES and one.longer in SIDES], confidence)


def _votes_alpha(verdicts: Sequence[Verdict]) -> float | None:
    """Return Krippendorff's alpha of a panel's verdicts, nominal; None for one judge."""
    codes = {"a": 1.0, "b": 2.0, "tie": 3.0}
    votes = zip(*([codes[vote] for vote in one.votes] for one in verdicts if one.asked), strict=True)
    return krippendorff_alpha([*votes], "nominal")


def _better(a: float | None, b: float | None) -> str:
    """Return which grade is higher; one that is missing is better than none."""
    if a is None or b is None or a == b:
        return "tie"
    return "a" if a > b else "b"


def _question(settings: JudgeSettings) -> str:
    return settings.rubric if isinstance(settings.rubric, str) else settings.rubric.question


def _metrics(details: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalars for the tracker; what rests on nothing is left out."""
    known = {name: details[name]["mean"] for name in ("win_rate", "swap_consistency", "agreement")}
    if known["agreement"] is not None:
        known["agreement_low"] = details["agreement"]["low"]
    known |= {name: float(details[name]) for name in ("n", "unparsed", "equal_answers", "may_decide")}
    if graded := details["grades"]:
        known |= {f"score_{arm}": found["mean"] for arm, found in graded["arms"].items()}
        known |= {
            "score_gain": graded["difference"]["mean"],
            "score_agreement": graded["agreement"]["mean"],
            "scores_unparsed": float(sum(found["unparsed"] for found in graded["arms"].values())),
        }
    return {name: value for name, value in known.items() if value is not None}


def _headline(details: Mapping[str, Any]) -> str:
    if not details["n"]:
        return "No judge was asked (backend none), so none may decide."
    a, b = details["compared"]
    rate, agreement = details["win_rate"], details["agreement"]
    told = (
        f"The judge prefers {a} to {b} on {details['wins']} of {details['n']} examples, {b} on {details['losses']}, "
        f"{details['ties']} ties ({details['equal_answers']} of them equal answers, {details['unparsed']} unparsed): "
        f"win rate {_span(rate)}{_by_people(details['win_rate_corrected'], details['labels'])}."
    )
    if not agreement["n"]:
        return f"{told} No example has a labelled winner, so it may not decide.{_graded(details)}"
    verb = "may" if details["may_decide"] else "may not"
    return (
        f"{told} It agrees with the labels on {_span(agreement)} of {agreement['n']} (floor {details['floor']:.2f}): "
        f"it {verb} decide.{_graded(details)}"
    )


def _graded(details: Mapping[str, Any]) -> str:
    graded = details["grades"]
    if not graded:
        return ""
    a, b = graded["compared"]
    arms, gain, agreement = graded["arms"], graded["difference"], graded["agreement"]
    missing = sum(found["unparsed"] for found in arms.values())
    if gain["mean"] is None:
        return f" No pair of answers got two grades ({missing} replies without one)."
    trust = "" if graded["may_decide"] else "; below the floor, so the grades decide nothing"
    known = f"the higher grade is the labels' winner on {_span(agreement)}" if agreement["n"] else "no labels"
    return (
        f" Graded 1 to 5, {a} has {_span(arms[a])} and {b} {_span(arms[b])}, difference {_span(gain, '+.2f')}"
        f"{_by_people(gain['corrected'], details['labels'], '+.2f')} "
        f"on {gain['n']} ({missing} replies without a grade); {known}{trust}."
    )


def _by_people(found: Mapping[str, Any], labels: Mapping[str, Any], form: str = ".2f") -> str:
    """Return the number that people's grades correct, where people were asked."""
    if not labels or found["mean"] is None:
        return ""
    return f", corrected by people's labels of {found['n']} {_span(found, form)}"


def _span(found: Mapping[str, Any], form: str = ".2f") -> str:
    if found["mean"] is None:
        return "unknown"
    return f"{found['mean']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"
