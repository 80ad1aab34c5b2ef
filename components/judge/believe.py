"""What the judge's verdicts and grades come to, and how far it can be believed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..contracts.metrics import Summary
from ..contracts.recipe import GRADES, JudgeSettings
from ..contracts.rows import Grade, Verdict
from ..shared.judging import rubric_card
from ..shared.statistics import Interval, mean_interval, paired_difference, proportion

LOW, HIGH = float(GRADES[0]), float(GRADES[-1])


def summarise(
    verdicts: Sequence[Verdict],
    arms: tuple[str, str],
    settings: JudgeSettings,
    *,
    panel: Mapping[str, Sequence[Verdict]] | None = None,
    grades: Sequence[Grade] = (),
    confidence: float = 0.95,
) -> Summary:
    """Return the table of the report, and whether the judge may decide anything.

    Args:
        verdicts: Of all judges together; unparsed ones count as ties, and against the judge.
        arms: Arm a and arm b.
        settings: The floor, the rubric and the backend.
        panel: Each judge's own verdicts, by its identity.
        grades: Of every arm; empty where the rubric has no scale.
        confidence: Of the intervals.
    """
    winners = Counter(verdict.winner for verdict in verdicts)
    points = [{"a": 1.0, "tie": 0.5, "b": 0.0}[verdict.winner] for verdict in verdicts]
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
        **told,
        "floor": settings.min_agreement,
        "may_decide": may_decide,
        "rubric": rubric_card(settings.rubric) | {"text": _question(settings)},
        "backend": "panel" if settings.panel else settings.backend,
        "judges": {identity: reliability(own, confidence) for identity, own in (panel or {}).items()},
        "grades": grading(grades, verdicts, arms, settings, confidence) if grades else {},
    }
    return Summary(step="judge", headline=_headline(details), metrics=_metrics(details), details=details)


def reliability(verdicts: Sequence[Verdict], confidence: float = 0.95) -> dict[str, Any]:
    """Return what speaks for and against believing some verdicts; pairs of equal answers are left out."""
    asked = [verdict for verdict in verdicts if verdict.asked]
    labelled = [verdict for verdict in asked if verdict.label in ("a", "b")]
    consistent = sum(verdict.first == verdict.swapped != "unparsed" for verdict in asked)
    return {
        "swap_consistency": share(consistent, len(asked), confidence),
        "agreement": share(sum(one.winner == one.label for one in labelled), len(labelled), confidence),
        "unparsed": sum("unparsed" in (verdict.first, verdict.swapped) for verdict in asked),
    }


def grading(
    grades: Sequence[Grade],
    verdicts: Sequence[Verdict],
    arms: tuple[str, str],
    settings: JudgeSettings,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Return the mean grade of each arm, the paired difference of two, and whether grades agree with labels.

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
    table: dict[str, Any] = {}
    for arm, rows in by_arm.items():
        told = [(row.grade, row.group) for row in rows.values() if row.grade is not None]
        found = _mean([grade for grade, _ in told], [group for _, group in told], confidence)
        table[arm] = cell(found, LOW, HIGH) | {"unparsed": sum(row.grade is None for row in rows.values())}
    pairs = {key: (row, by_arm[arms[1]][key]) for key, row in by_arm[arms[0]].items() if key in by_arm[arms[1]]}
    both = [(a.grade, b.grade, a.group) for a, b in pairs.values() if a.grade is not None and b.grade is not None]
    difference = None
    if both:
        a, b, groups = zip(*both, strict=True)
        difference = paired_difference(a, b, confidence, clusters=groups, low=LOW, high=HIGH)
    labelled = [(verdict.label, *pairs[verdict.example_id]) for verdict in verdicts if verdict.label in ("a", "b")]
    right = sum(_better(a.grade, b.grade) == label for label, a, b in labelled)
    agreement = share(right, len(labelled), confidence)
    return {
        "arms": table,
        "compared": list(arms),
        "difference": cell(difference, LOW - HIGH, HIGH - LOW),
        "agreement": agreement,
        "may_decide": bool(labelled) and agreement["low"] >= settings.min_agreement,
    }


def share(count: int, of: int, confidence: float) -> dict[str, Any]:
    """Return a share with its interval, as a cell of the table."""
    return cell(proportion(count, of, confidence) if of else None)


def cell(interval: Interval | None, low: float = 0.0, high: float = 1.0) -> dict[str, Any]:
    """Return a cell of the table; what rests on nothing has no mean, and could lie anywhere."""
    return interval.model_dump() if interval else {"mean": None, "low": low, "high": high, "n": 0}


def _mean(values: Sequence[float], groups: Sequence[str], confidence: float) -> Interval | None:
    return mean_interval(values, confidence, clusters=groups, low=LOW, high=HIGH) if values else None


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
        f"win rate {_span(rate)}."
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
        f" Graded 1 to 5, {a} has {_span(arms[a])} and {b} {_span(arms[b])}, difference {gain['mean']:+.2f} "
        f"[{gain['low']:+.2f}, {gain['high']:+.2f}] on {gain['n']} ({missing} replies without a grade); {known}{trust}."
    )


def _span(found: Mapping[str, Any]) -> str:
    if found["mean"] is None:
        return "unknown"
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
