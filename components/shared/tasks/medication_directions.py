"""Medication directions ("sigs") to JSON: a line as a prescriber writes it, and the fields a pharmacy dispenses by.

    "1-2 tabs po q6h prn pain, max 6/day"
    → {"low":1,"dose":2,"unit":"tablet","route":"oral","per_day":4,"prn":"pain","daily":8,"max":6,"flag":"over"}

Fields, in this order, without spaces; a field that does not apply is left out:

* `low`      lower end of a dose range; only for ranges
* `dose`     units per intake; the upper end of a range, the first step of a taper
* `unit`     tablet, capsule, puff, drop, mL
* `route`    oral, inhaled, eye, rectal
* `per_day`  intakes a day; "q6h" and "qid" are both 4
* `prn`      reason of an as-needed direction
* `days`     length in days; of each step for a taper
* `taper`    doses of the steps, first to last
* `daily`    most units a day: dose × per_day
* `max`      stated daily maximum
* `flag`     the first that holds: `route` (the unit cannot go that way), `nomax` (as needed without a daily maximum),
             `over` (daily exceeds max), else `ok`

The directions are synthetic: nothing in them comes from a patient, and the verifier is no medical advice.
"""

import json
import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ...contracts.errors import DataError, RecipeError
from ...contracts.metrics import Metric
from ...contracts.rows import Message
from ..strict_json import equal_share, read_object

SYSTEM = "Sig to JSON."
FLAG_SHARES = {"ok": 0.67, "route": 0.15, "nomax": 0.09, "over": 0.09}
"""Flag to its share of the generated rows (before repeats are left out)."""
UNSAFE = frozenset(FLAG_SHARES) - {"ok"}
NEAR_MISS = -0.4
"""Reward of an unsafe direction that passes as safe.

What GRPO made of it in single runs of 12 to 16 steps, from a model that misses 0.43 of the unsafe directions and flags
0.05 of the safe ones (181 and 262 held out): at 0 (and twice the rate) 0.54 and 0.00, at -0.3 0.38 and 0.08, at -0.5
0.29 and 0.15, at -1 0.16 and 0.39.
"""
MAX_ATTEMPTS = 1_000
"""Draws in a row that only repeat known directions before the generator says that there are no more."""

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
UNITS = {
    "tablet": ["tab", "tabs", "tablet", "tablets"],
    "capsule": ["cap", "caps", "capsule", "capsules"],
    "puff": ["puff", "puffs", "inh"],
    "drop": ["gtt", "gtts", "drop", "drops"],
    "mL": ["mL", "ml", "cc"],
}
UNIT_WEIGHTS = [4, 3, 2, 2, 2]
DOSES = {"mL": [5, 10]}
ROUTES = {
    "oral": ["po", "by mouth", "orally"],
    "inhaled": ["via inhaler", "inhaled"],
    "eye": ["ou", "in both eyes", "to eyes"],
    "rectal": ["pr", "rectally"],
}
FITTING = {
    "tablet": "oral",
    "capsule": "oral",
    "puff": "inhaled",
    "drop": "eye",
    "mL": "oral",
}
FREQUENCIES = {
    1: ["qd", "once daily", "daily", "every day", "qhs", "at bedtime"],
    2: ["bid", "twice daily", "q12h", "every 12 hours"],
    3: ["tid", "three times daily", "q8h", "every 8 hours"],
    4: ["qid", "four times daily", "q6h", "every 6 hours"],
    6: ["q4h", "every 4 hours"],
}
REASONS = ["pain", "nausea", "itching", "cough", "anxiety", "wheezing", "fever", "sleep", "headache", "cramps"]
DAYS = [3, 5, 7, 10, 14, 21, 30]
MAXIMA = {"mL": [10, 20, 30, 40, 60]}
TYPOS = {
    "tabelts": "tablets",
    "talbet": "tablet",
    "capsuels": "capsules",
    "caspule": "capsule",
    "pufs": "puffs",
    "dorps": "drops",
    "moth": "mouth",
    "dialy": "daily",
    "evrey": "every",
    "tims": "times",
    "twise": "twice",
    "neded": "needed",
    "dyas": "days",
}
"""Misspelling to the word that is meant; each is made by the generator and folded by `group`."""


class Direction(NamedTuple):
    """What a direction says, before it is written as text or as JSON."""

    low: int | None
    dose: int
    unit: str
    route: str
    per_day: int
    prn: str | None
    days: int | None
    taper: list[int] | None
    max: int | None

    @property
    def daily(self) -> int:
        """Most units a day."""
        return self.dose * self.per_day

    @property
    def flag(self) -> str:
        """The first safety problem that holds, or `ok`."""
        if self.route != FITTING[self.unit]:
            return "route"
        if self.prn and self.max is None:
            return "nomax"
        return "over" if self.max is not None and self.daily > self.max else "ok"

    @property
    def answer(self) -> str:
        """The reference: compact JSON in the documented order."""
        fields = self._asdict()
        most = fields.pop("max")
        fields |= {"daily": self.daily, "max": most, "flag": self.flag}
        return json.dumps({k: v for k, v in fields.items() if v is not None}, separators=(",", ":"))


class MedicationDirections:
    """The task of this module; see there for the fields and their meaning."""

    name = "medication_directions"
    metrics: Sequence[Metric] = (
        Metric(
            name="exact",
            title="Exact",
            better="higher",
            definition="Every field equals the reference, in value and type, and there is no other field.",
        ),
        Metric(
            name="near_miss",
            title="Near misses",
            better="lower",
            definition="An unsafe direction (flag other than ok) that the answer does not flag; "
            "an answer that cannot be read counts as one. Unsafe directions only.",
        ),
        Metric(
            name="false_alarm",
            title="False alarms",
            better="lower",
            definition="A safe direction that the answer flags. Safe directions only.",
        ),
        Metric(
            name="valid",
            title="Valid JSON",
            better="higher",
            definition="The answer is one JSON object (RFC 8259) without repeated keys, NaN or other text.",
        ),
        Metric(
            name="fields",
            title="Fields right",
            better="higher",
            definition="Equal fields as a share of all fields of the reference and the answer together.",
        ),
    )

    def prompt(self, text: str) -> list[Message]:
        """Return the conversation that asks for the fields of one direction."""
        return [Message(role="system", content=SYSTEM), Message(role="user", content=text)]

    def group(self, prompt: Sequence[Message]) -> str:
        """Return the last user turn in a normal form: see `normalise`."""
        return normalise(next(turn.content for turn in reversed(prompt) if turn.role == "user"))

    def slices(self, prompt: Sequence[Message], reference: str) -> list[str]:
        """Return difficulty (hard: a range, a taper, a typo, or as needed with a maximum), safety and flag.

        Raises:
            DataError: The reference is not the JSON of a direction.
        """
        fields = read_reference(reference)
        text = " ".join(turn.content for turn in prompt if turn.role == "user")
        hard = fields.keys() & {"low", "taper"} or {"prn", "max"} <= fields.keys() or TYPOS.keys() & _words(text)
        return [
            f"difficulty={'hard' if hard else 'easy'}",
            f"safety={'safe' if fields['flag'] == 'ok' else 'unsafe'}",
            f"flag={fields['flag']}",
        ]

    def score(self, response: str, reference: str) -> dict[str, float | None]:
        """Return the value of every metric; None where it does not apply.

        Raises:
            DataError: The reference is not the JSON of a direction.
        """
        wanted, got = read_reference(reference), read_object(response)
        unsafe = wanted["flag"] != "ok"
        flagged = got is not None and isinstance(got.get("flag"), str) and got["flag"] in UNSAFE
        fields = equal_share(got or {}, wanted)
        return {
            "exact": float(fields == 1),
            "near_miss": float(not flagged) if unsafe else None,
            "false_alarm": None if unsafe else float(flagged),
            "valid": float(got is not None),
            "fields": fields,
        }

    def reward(self, response: str, reference: str, finished: bool = True) -> float:
        """Return 0.1 for valid JSON, up to 0.4 for its fields and 0.5 when all are right; 0 for a text cut short.

        An unsafe direction that passes as safe earns `NEAR_MISS`, however many other fields are right: it is the error
        that reaches a patient, where a false alarm costs a pharmacist a look.
        """
        scores = self.score(response, reference)
        if finished and scores["valid"] and scores["near_miss"]:
            return NEAR_MISS
        if not finished:
            return 0.0
        return 0.1 * (scores["valid"] or 0) + 0.4 * (scores["fields"] or 0) + 0.5 * (scores["exact"] or 0)

    def generate(self, rows: int, seed: int) -> Iterator[dict[str, Any]]:
        """Yield raw rows, no two of one group.

        Raises:
            RecipeError: There are not that many different directions.
        """
        rng = random.Random(seed)
        seen: set[str] = set()
        for _ in range(rows):
            direction, text = self._new(rng, seen)
            turns = [*self.prompt(text), Message(role="assistant", content=direction.answer)]
            yield {"messages": [turn.model_dump() for turn in turns]}

    def _new(self, rng: random.Random, seen: set[str]) -> tuple[Direction, str]:
        for _ in range(MAX_ATTEMPTS):
            flag = rng.choices(list(FLAG_SHARES), list(FLAG_SHARES.values()))[0]
            direction = draw(rng)
            while direction.flag != flag:
                direction = draw(rng)
            text = write(direction, rng)
            if (key := normalise(text)) not in seen:
                seen.add(key)
                return direction, text
        raise RecipeError(
            f"the generator knows no more than about {len(seen)} different directions",
            where="data.rows",
            fix="ask for fewer rows",
        )


TASK = MedicationDirections()


def draw(rng: random.Random) -> Direction:
    """Return a random direction, safe or not."""
    unit = rng.choices(list(UNITS), UNIT_WEIGHTS)[0]
    dose = rng.choice(DOSES.get(unit, [1, 1, 2, 2, 3]))
    shape = rng.random()
    step = 5 if unit == "mL" else 1
    tapers = unit in ("tablet", "capsule", "mL") and dose > step
    taper = list(range(dose, 0, -step)) if shape < 0.1 and tapers else None
    low = dose - step if 0.1 <= shape < 0.24 and dose > step else None
    fits = rng.random() >= 0.2
    return Direction(
        low=low,
        dose=dose,
        unit=unit,
        route=FITTING[unit] if fits else rng.choice([r for r in ROUTES if r != FITTING[unit]]),
        per_day=rng.choice(list(FREQUENCIES)),
        prn=rng.choice(REASONS) if rng.random() < 0.5 and not taper else None,
        days=rng.choice(DAYS) if rng.random() < 0.4 or taper else None,
        taper=taper,
        max=rng.choice(MAXIMA.get(unit, [2, 3, 4, 6, 8, 12])) if rng.random() < 0.5 else None,
    )


def write(direction: Direction, rng: random.Random) -> str:
    """Return the direction as one of the many ways to write it: abbreviations, words, capitals, a rare typo."""
    amount = _number(direction.dose, rng)
    if direction.low:
        amount = rng.choice([f"{direction.low}-{direction.dose}", f"{direction.low} to {direction.dose}"])
    unit, route = rng.choice(UNITS[direction.unit]), rng.choice(ROUTES[direction.route])
    text = f"{rng.choice(['', '', 'take ', 'use '])}{amount} {unit} {route} "
    text += rng.choice(FREQUENCIES[direction.per_day])
    if direction.prn:
        text += rng.choice([" prn ", " as needed for ", " prn for "]) + direction.prn
    if direction.days:
        length = rng.choice(["x{}d", "for {} days", "x {} days"]).format(direction.days)
        text += f" {length}" + "".join(f" then {dose} {length}" for dose in (direction.taper or [])[1:])
    if direction.max is not None:
        text += rng.choice([", max {}/day", "; not more than {} per day", " (max {} daily)"]).format(direction.max)
    if rng.random() < 0.08:
        text = _misspelt(text, rng)
    return text.upper() if rng.random() < 0.1 else text


def _number(value: int, rng: random.Random) -> str:
    return NUMBERS[value] if value in NUMBERS and rng.random() < 0.3 else str(value)


def _misspelt(text: str, rng: random.Random) -> str:
    """Replace one word by a misspelling of it, if there is one for any."""
    found = [(wrong, right) for wrong, right in TYPOS.items() if re.search(rf"\b{right}\b", text)]
    if not found:
        return text
    wrong, right = rng.choice(found)
    return re.sub(rf"\b{right}\b", wrong, text, count=1)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def _any_of(forms: Sequence[str]) -> str:
    """Return a pattern for any of the forms as whole words, the longest first."""
    return rf"\b(?:{'|'.join(map(re.escape, sorted(map(str.lower, forms), key=len, reverse=True)))})\b"


FOLDS: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\b([a-z])\.([a-z])\.(?:([a-z])\.?)?", r"\1\2\3 "),
        (r"(?<!\d)[.,]|[.,](?!\d)|[();:!?]", " "),
        *((rf"\b{wrong}\b", right) for wrong, right in TYPOS.items()),
        *((rf"\b{word}\b", str(value)) for value, word in NUMBERS.items() if value not in (3, 4)),
        (r"\bthree\b(?! times)", "3"),
        (r"\bfour\b(?! times)", "4"),
        (r"\b(\d+(?:\.\d+)?)([a-z]+)\b", r"\1 \2"),
        (r"\b(\d+) ?(?:-|–|to) ?(\d+)\b", r"\1-\2"),
        (r"\b(?:max(?:imum)?(?: of)?|not? more than|do not exceed) ?(\d+)", r"max=\1"),
        (r"(max=\d+) ?(?:/|per|a)? ?(?:day|daily|24 h(?:ours)?)\b", r"\1"),
        (r"\bq ?(\d+) ?(?:h|hr|hrs|hours?)\b", r"q\1h"),
        *((_any_of(forms), f"per_day={count}") for count, forms in sorted(FREQUENCIES.items(), reverse=True)),
        (r"\b(?:x|for) ?(\d+) ?d(?:ays?)?\b", r"days=\1"),
        (r"\b(?:as needed|prn)\b(?: for\b)?", "prn"),
        *((_any_of(forms), f"route={route}") for route, forms in ROUTES.items()),
        *((_any_of(forms), f"unit={unit}") for unit, forms in UNITS.items()),
        (r"\b(?:take|use|give)\b", " "),
    ]
]
"""Rules of `normalise`, applied in order."""


def normalise(text: str) -> str:
    """Return the normal form of a direction; two spellings of one direction have the same.

    Folded, in this order: Unicode width and case; punctuation other than decimal points and range dashes; the known
    typos; number words; spacing around numbers; ways to write a range, a daily maximum, a frequency, a length, "as
    needed", a route and a unit; the verb. A frequency folds to its count a day, so that "q6h" and "qid", which have
    the same answer, share a group. The order of the parts and any unknown word are kept.
    """
    text = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    for pattern, replacement in FOLDS:
        text = " ".join(pattern.sub(replacement, text).split())
    return text


def read_reference(text: str) -> dict[str, Any]:
    """Return the fields of a reference.

    Raises:
        DataError: It is not the JSON of a direction.
    """
    fields = read_object(text)
    if fields is None or not isinstance(fields.get("flag"), str) or fields["flag"] not in FLAG_SHARES:
        raise DataError(
            f"the reference is not the JSON of a medication direction: {text[:60]!r}",
            where="reference",
            fix=f"write an object whose flag is one of {list(FLAG_SHARES)}",
        )
    return fields
