"""Metrics to compose a task from: small pure functions, each with its definition, its unit and where it is undefined.

A task's `score` calls them and names the result (`contracts.metrics.Metric`); the tables, slices and intervals follow
from that by themselves (`measure.tabulate`). What has no value on an example is None and is left out of the mean, never
counted as 0 or 1. Elsewhere, because they need more than a text: `similarity.similarity` (an encoder),
`calibration.calibration_error` (confidences), `train_pretrain` (perplexity).

The pharmacy set measures what a system says of medicines. It is arithmetic, and no medical advice.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

from ..contracts.errors import DataError
from .statistics import Interval, mean_interval
from .strict_json import equal_share, read_object, read_value, same

ARTICLES = re.compile(r"\b(a|an|the)\b")
WORD = re.compile(r"[^\W_]+")

# --- text -----------------------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Return the text with Unicode width (NFKC), case and runs of white space folded."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact_match(answer: str, reference: str) -> float:
    """Return 1 where both are the same in normal form, else 0."""
    return float(normalise(answer) == normalise(reference))


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return WORD.findall(text.lower())


def squad_tokens(text: str) -> list[str]:
    """Return the tokens of SQuAD's normal form: lower case, no punctuation, no articles (Rajpurkar et al. 2016)."""
    bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return ARTICLES.sub(" ", bare).split()


def token_f1(answer: str, reference: str, tokens: Callable[[str], list[str]] = squad_tokens) -> float:
    """Return the F1 of two texts' tokens, each counted as often as it stands in both.

    Where one has none it is 1 if neither has, else 0.

    Args:
        answer: What was said.
        reference: What is right.
        tokens: Splits a text; SQuAD's by default.
    """
    left, right = Counter(tokens(answer)), Counter(tokens(reference))
    if not left or not right:
        return float(left == right)
    return 2 * (left & right).total() / (left.total() + right.total())


def field_accuracy(answer: str, reference: str) -> float:
    """Return the share of fields in which two JSON objects agree, of all fields in either; 0 for what is no object.

    Raises:
        DataError: The reference is no object.
    """
    wanted = read_object(reference)
    if wanted is None:
        raise DataError(f"the reference {reference[:40]!r} is no JSON object", where="reference", fix="write an object")
    got = read_object(answer)
    return 0.0 if got is None else equal_share(got, wanted)


def recall_at(rank: int | None, k: int) -> float:
    """Return 1 where the right passage is among the first k; ranks count from 1, None was not found."""
    return float(rank is not None and rank <= k)


def reciprocal_rank(rank: int | None) -> float:
    """Return 1 / rank; 0 where it was not found."""
    return 1 / rank if rank else 0.0


def win_points(winner: Literal["a", "b", "tie"]) -> float:
    """Return what a comparison gives to a: 1, or 0, or a half for a tie, so that the mean is the win rate with ties."""
    return {"a": 1.0, "tie": 0.5, "b": 0.0}[winner]


# --- calls of tools -------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call of a tool."""

    name: str
    arguments: dict[str, Any]


def read_calls(text: str) -> list[Call] | None:
    """Return the calls that a text makes; None where it is nothing but calls in one of the forms.

    The forms: `{"name": …, "arguments": {…}}`, the same below a key `function` (OpenAI), arguments as a JSON string,
    and a list of any of these. Read strictly: no repeated key, no NaN, nothing around it.
    """
    value = read_value(text)
    calls = [_call(one) for one in (value if isinstance(value, list) else [value])]
    return None if None in calls else [call for call in calls if call]


def calls_exact(answer: str, reference: str, *, any_order: bool = False, sets: Collection[str] = ()) -> float:
    """Return 1 where an answer makes the reference's calls: equal names and equal arguments, none more and none less.

    The order of an object's keys never counts; 1, 1.0, "1" and true are four values.

    Args:
        answer: What was said; what cannot be read as calls is 0.
        reference: What is right.
        any_order: Calls that may be made in parallel: their order does not count.
        sets: Names of arguments that are lists in which order does not count.

    Raises:
        DataError: The reference cannot be read as calls.
    """
    wanted, got = read_calls(reference), read_calls(answer)
    if wanted is None:
        raise DataError(
            f"the reference {reference[:40]!r} is no call of a tool",
            where="reference",
            fix='write {"name": "…", "arguments": {…}}, or a list of these',
        )
    if got is None or len(got) != len(wanted):
        return 0.0
    if not any_order:
        return float(all(_same_call(one, other, sets) for one, other in zip(got, wanted, strict=True)))
    left = list(wanted)
    for call in got:
        match = next((place for place, other in enumerate(left) if _same_call(call, other, sets)), None)
        if match is None:
            return 0.0
        left.pop(match)
    return 1.0


def _call(value: Any) -> Call | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        arguments = read_object(arguments)
    extra = value.keys() - {"name", "arguments"}
    return Call(value["name"], arguments) if isinstance(arguments, dict) and not extra else None


def _same_call(one: Call, other: Call, sets: Collection[str]) -> bool:
    if one.name != other.name or one.arguments.keys() != other.arguments.keys():
        return False
    return all(
        _same_items(value, other.arguments[name]) if name in sets else same(value, other.arguments[name])
        for name, value in one.arguments.items()
    )


def _same_items(one: Any, other: Any) -> bool:
    """Tell whether two lists hold the same items, as often, in whatever order."""
    if not isinstance(one, list) or not isinstance(other, list) or len(one) != len(other):
        return same(one, other)
    left = list(other)
    for item in one:
        match = next((place for place, candidate in enumerate(left) if same(item, candidate)), None)
        if match is None:
            return False
        left.pop(match)
    return True


# --- pharmacy: interactions -----------------------------------------------------------------------------------------

Pair = frozenset[str]
"""Two different drugs, in no order."""


class Detection(NamedTuple):
    """What was found among the pairs of one patient's drugs."""

    hits: int
    """Known interactions that were named."""
    misses: int
    alarms: int
    """Named pairs that are no known interaction, of these drugs or others."""
    clear: int
    """Pairs of these drugs that rightly were not named."""

    @property
    def sensitivity(self) -> float | None:
        """Share of the known interactions that were named; None where there is none."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None

    @property
    def specificity(self) -> float | None:
        """Share of the harmless pairs that were not named; None where there is none."""
        return self.clear / (self.clear + self.alarms) if self.clear + self.alarms else None


def pairs(named: Iterable[Sequence[str]], synonyms: Mapping[str, str] | None = None) -> set[Pair]:
    """Return pairs of drug names in normal form.

    Args:
        named: Two names each.
        synonyms: Brand, salt or misspelling to the name that counts, in normal form.

    Raises:
        DataError: One names not two drugs.
    """
    known = synonyms or {}
    found = set()
    for one in named:
        pair = frozenset(known.get(normalise(name), normalise(name)) for name in one)
        if len(one) != 2 or len(pair) != 2:
            raise DataError(f"{list(one)!r} are not two drugs", where="interactions", fix="name two different drugs")
        found.add(pair)
    return found


def detect(named: Collection[Pair], known: Collection[Pair], drugs: Collection[str]) -> Detection:
    """Return how the named pairs compare with the known interactions among a patient's drugs.

    Args:
        named: Of the answer, by `pairs`.
        known: Of the reference, by `pairs`.
        drugs: All drugs of the patient, in the same normal form: their other pairs are harmless.

    Raises:
        DataError: A known interaction is of a drug that the patient does not have.
    """
    every = {frozenset(pair) for pair in combinations(sorted(set(drugs)), 2)}
    if strangers := set(known) - every:
        raise DataError(
            f"{sorted(strangers.pop())} interact, and the patient does not have both",
            where="interactions",
            fix="list all of the patient's drugs, by the names that the interactions have",
        )
    hits, alarms = len(set(named) & set(known)), len(set(named) - set(known))
    return Detection(hits, len(set(known)) - hits, alarms, len(every - set(known) - set(named)))


def pooled(parts: Sequence[tuple[int, int]], level: float = 0.95) -> Interval | None:
    """Return successes as a share of trials over many examples, whose own trials are one draw; None without a trial.

    So do interactions, assertions or fields become one share, in which an example with many counts as many.

    Args:
        parts: Successes and trials of each example.
        level: Of the interval.
    """
    values: list[float] = []
    keys: list[Hashable] = []
    for place, (successes, trials) in enumerate(parts):
        values += [1.0] * successes + [0.0] * (trials - successes)
        keys += [place] * trials
    return mean_interval(values, level, clusters=keys) if values else None


# --- pharmacy: doses ------------------------------------------------------------------------------------------------

MILLIGRAMS = {"mcg": 1e-3, "µg": 1e-3, "μg": 1e-3, "ug": 1e-3, "microgram": 1e-3, "micrograms": 1e-3, "mg": 1.0}
MILLIGRAMS |= {"milligram": 1.0, "milligrams": 1.0, "g": 1e3, "gram": 1e3, "grams": 1e3}
"""Unit of mass to milligrams; of the two signs for micro one is the Greek letter."""
TENFOLD = 10.0
CHILD = 12.0
"""Years below which a dose is a child's, where a rule has one."""


class Patient(NamedTuple):
    """What a dose depends on."""

    age: float
    """Years."""
    weight: float
    """Kilograms."""
    creatinine: float | None = None
    """Of the serum, mg/dL; None where it was not measured: kidneys are then taken to be sound."""
    female: bool = False


class Dosing(NamedTuple):
    """How a drug is dosed."""

    mg: float
    """Of one dose, of an adult; per kilogram if `per_kg`."""
    per_kg: bool = False
    child_mg_per_kg: float | None = None
    """For those under `child_below`; None: as an adult."""
    child_below: float = CHILD
    cap: float | None = None
    """Largest dose in mg, whatever the weight."""
    renal: tuple[tuple[float, float], ...] = ()
    """(clearance in mL/min, share of the dose): below the lowest clearance that is undercut its share is given."""


Verdict = Literal["right", "over", "under", "tenfold"]


def milligrams(amount: float, unit: str) -> float:
    """Return a mass in milligrams.

    Raises:
        DataError: The unit is none of mass: mL or tablets say nothing without a strength.
    """
    factor = MILLIGRAMS.get(unit.strip().lower())
    if factor is None:
        raise DataError(f"{unit!r} is no unit of mass", where="dose", fix=f"write one of {sorted(MILLIGRAMS)}")
    return amount * factor


def creatinine_clearance(age: float, weight: float, creatinine: float, female: bool) -> float:
    """Return the creatinine clearance in mL/min (Cockcroft and Gault 1976).

    Args:
        age: Years.
        weight: Kilograms.
        creatinine: Of the serum, mg/dL.
        female: Takes 0.85 of it.

    Raises:
        DataError: A value is not above 0.
    """
    if min(age, weight, creatinine) <= 0:
        raise DataError("age, weight and creatinine are above 0", where="patient", fix="correct the row")
    return max(0.0, 140 - age) * weight * (0.85 if female else 1.0) / (72 * creatinine)


def reference_dose(dosing: Dosing, patient: Patient) -> float:
    """Return the right dose in mg: by age and weight, then by the kidneys, then capped."""
    child = dosing.child_mg_per_kg is not None and patient.age < dosing.child_below
    if child:
        dose = (dosing.child_mg_per_kg or 0.0) * patient.weight
    else:
        dose = dosing.mg * (patient.weight if dosing.per_kg else 1.0)
    if patient.creatinine is not None:
        clearance = creatinine_clearance(patient.age, patient.weight, patient.creatinine, patient.female)
        dose *= next((share for below, share in sorted(dosing.renal) if clearance < below), 1.0)
    return dose if dosing.cap is None else min(dose, dosing.cap)


def judge_dose(
    given: float, wanted: float | tuple[float, float], *, tolerance: float = 0.05, cap: float | None = None
) -> Verdict:
    """Return what a dose is: right within the tolerance and never above the cap, else over or under, or ten times over.

    Args:
        given: mg.
        wanted: mg, or the ends of a range.
        tolerance: As a share of the nearer end.
        cap: mg; to be above it is to be over, tolerance or not.
    """
    low, high = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    hair = 1e-9 * max(high, 1.0)  # of rounding: 0.3 is not 0.1 + 0.2
    if given >= TENFOLD * high - hair:
        return "tenfold"
    if given > high * (1 + tolerance) + hair or (cap is not None and given > cap + hair):
        return "over"
    return "under" if given < low * (1 - tolerance) - hair else "right"


def dose_scores(verdict: Verdict) -> dict[str, float]:
    """Return the scores of a dose: `dose` (precision), and over- and under-doses and tenfold errors apart."""
    return {
        "dose": float(verdict == "right"),
        "overdose": float(verdict in ("over", "tenfold")),
        "underdose": float(verdict == "under"),
        "tenfold": float(verdict == "tenfold"),
    }


# --- pharmacy: rates ------------------------------------------------------------------------------------------------


def prevention_rate(
    with_model: int, without: int, level: float = 0.95, exposures: tuple[float, float] = (1.0, 1.0)
) -> Interval | None:
    """Return 1 − errors with the model / errors without it; None where there were none without: 0 of 0 is not 100 %.

    Errors that the model itself brings in count among those with it, so the rate may fall below 0. The interval is
    Clopper and Pearson's of the errors' split, given how many there were (Przyborowski and Wilenski 1940).

    Args:
        with_model: Errors that got through, of what was there and of what the model added.
        without: Errors that got through without it.
        level: Of the interval.
        exposures: Directions dispensed with and without it, where they differ.

    Returns:
        The rate; `n` is the number of errors in all.
    """
    from scipy.stats import beta

    if without == 0:
        return None
    ratio = exposures[1] / exposures[0]
    n, tail = with_model + without, (1 - level) / 2
    low = float(beta.ppf(tail, with_model, without + 1)) if with_model else 0.0
    high = float(beta.ppf(1 - tail, with_model + 1, without))
    rates = [1 - ratio * share / (1 - share) for share in (low, with_model / n, high)]
    return Interval(mean=rates[1], low=rates[2], high=rates[0], n=n)


Kind = Literal["indication", "contraindication", "boxed_warning", "maximum_dose", "interaction", "other"]
Stance = Literal["stated", "omitted", "contradicted"]


class Assertion(NamedTuple):
    """One thing that a label says, and what an answer makes of it."""

    kind: Kind
    stance: Stance


def label_scores(assertions: Sequence[Assertion]) -> dict[str, float | None]:
    """Return how an answer keeps to a label.

    Returns:
        `compliance`: share of the assertions that are stated, None where there is none; `contradiction`: share that are
        contradicted; `breach`: 1 where a contraindication is contradicted, however much else is right (critical), and
        None where the label has none.
    """
    if not assertions:
        return {"compliance": None, "contradiction": None, "breach": None}
    stances = Counter(one.stance for one in assertions)
    barred = [one.stance for one in assertions if one.kind == "contraindication"]
    return {
        "compliance": stances["stated"] / len(assertions),
        "contradiction": stances["contradicted"] / len(assertions),
        "breach": float("contradicted" in barred) if barred else None,
    }


Review = Literal["accepted", "edited", "rejected"]


class Acceptance(NamedTuple):
    """What pharmacists did with what they reviewed."""

    accepted: Interval
    """Share accepted without a change."""
    overridden: Interval
    """1 − accepted: edited, then accepted, is an override."""


def acceptance(
    reviews: Sequence[Review | None], reviewers: Sequence[Hashable] | None = None, level: float = 0.95
) -> Acceptance | None:
    """Return acceptance and override rate of the reviewed items; None where none was reviewed.

    Args:
        reviews: None for an item that nobody reviewed: it is in neither rate.
        reviewers: Who reviewed each item; items of one person are one draw.
        level: Of the intervals.
    """
    kept = [place for place, review in enumerate(reviews) if review is not None]
    if not kept:
        return None
    keys = [reviewers[place] for place in kept] if reviewers is not None else None
    rate = mean_interval([float(reviews[place] == "accepted") for place in kept], level, clusters=keys)
    return Acceptance(rate, Interval(mean=1 - rate.mean, low=1 - rate.high, high=1 - rate.low, n=rate.n))
