"""Questions about medicines, as patients and staff put them, and the passage of a leaflet that answers each.

Every medicine, its names and all that is said of it is invented: nothing here is drug information or medical advice.
Medicines come in pairs with names that look alike, and each has `TOPICS_EACH` passages that differ in one fact, so that
neither the name nor the subject alone finds the right one. A question names the medicine by its generic name, its brand
or a misspelling of either, and rarely in the words of the leaflet. All rows of a medicine are one group: the test asks
about medicines that training never named.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ...contracts.errors import RecipeError
from .retrieval import Retrieval

TOPICS_EACH = 8
"""Passages of a medicine."""
MAX_MEDICINES = 1_000
"""There are 1,470 brands, and the further the generator goes the more names differ in one letter only."""
NAME_SHARES = {"generic": 0.4, "brand": 0.4, "misspelt": 0.2}
"""How a question names the medicine."""

STARTS = "Vel Zor Bra Cli Dex Fen Gal Hal Iva Jor Kel Lum Mir Nov Ola Pra Que Ral Sul Tam Ulo Vin Wex Xan Yal"
MIDDLES = "mo ta ri be du fa li no pe sa ve zi"
ENDS = "rin pril zole mab statin dine oxin azide lukast gliptin tidine parin"
BRAND_STARTS = "Ax Bel Cor Dal Ely Fir Gno Hep Ino Jax Kor Lyn Mav Nex Oxa Pul Rem Sen Tru Vio Zep"
BRAND_MIDDLES = "i a o e u al en"
BRAND_ENDS = "to lax ra vance dyl trel mune quil sta zen"
"""Syllables of names."""


class Topic(NamedTuple):
    """One kind of fact: how the leaflet states it, how people ask for it, and the values it may have."""

    passages: Sequence[str]
    questions: Sequence[str]
    answer: str
    values: dict[str, Sequence[Any]]


OTHERS = (
    "warfarin, lithium, clarithromycin, digoxin, methotrexate, rifampicin, carbamazepine, ibuprofen, tramadol, "
    "verapamil, ketoconazole, phenytoin"
)
EFFECTS = (
    "headache, nausea, dizziness, constipation, diarrhoea, insomnia, drowsiness, fatigue, heartburn, cough, sweating, "
    "vomiting"
)
SIGNS = (
    "jaundice, chest pain, blurred vision, swollen lips, black stools, skin rash, muscle pain, fainting, hearing loss, "
    "fever"
)
HOURS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 18, 24)
DOSES = (5, 10, 15, 20, 25, 40, 50, 60, 75, 80, 100, 125, 150, 200, 250, 300, 400, 500)
TOPICS: dict[str, Topic] = {
    "maximum": Topic(
        ["{drug}, adults: the maximum daily dose is {dose} mg.", "Adults must not exceed {dose} mg of {drug} per day."],
        [
            "what's the most {name} a grown-up can have in 24h?",
            "{name} ceiling for a 45 yo pt?",
            "upper limit of {name} for adults?",
            "how much {name} is too much for me? I'm 38",
            "max {name}/day, adult",
        ],
        "{dose} mg",
        {"dose": DOSES},
    ),
    "start": Topic(
        ["{drug}, adults: treatment begins with {dose} mg once daily.", "Adults begin {drug} at {dose} mg once daily."],
        [
            "starting dose of {name} for a new adult pt?",
            "just prescribed {name}, how much do I take at first?",
            "what do we initiate {name} at?",
            "first dose of {name} for a grown-up?",
            "{name} initial mg, adult",
        ],
        "{dose} mg",
        {"dose": DOSES},
    ),
    "toddler": Topic(
        ["{drug}, children 2 to 5 years: {dose} mg per dose.", "Children aged 2 to 5 years take {dose} mg of {drug}."],
        [
            "how much {name} for my 3 year old?",
            "peds dose {name}, toddler",
            "my little one is 4, how many mg of {name}?",
            "{name} for a preschooler?",
            "what {name} dose does a 2 yo get?",
        ],
        "{dose} mg",
        {"dose": DOSES},
    ),
    "child": Topic(
        [
            "{drug}, children 6 to 11 years: {dose} mg per dose.",
            "Children aged 6 to 11 years take {dose} mg of {drug}.",
        ],
        [
            "how much {name} for my 8 year old?",
            "{name} dose for a schoolchild?",
            "my son is 10, how many mg of {name}?",
            "peds dose {name}, 7 yo",
            "what {name} dose does a 9 yo girl get?",
        ],
        "{dose} mg",
        {"dose": DOSES},
    ),
    "weight": Topic(
        ["{drug}, patients under 50 kg: {dose} mg per dose.", "Patients lighter than 50 kg take {dose} mg of {drug}."],
        [
            "pt is only 44 kilos, {name} dose?",
            "low body weight, how much {name}?",
            "she is very thin, what do we give of {name}?",
            "{name} for a 47kg woman?",
            "I weigh 43 kg, how many mg of {name}?",
        ],
        "{dose} mg",
        {"dose": DOSES},
    ),
    "renal": Topic(
        [
            "{drug} in renal impairment (eGFR below 30 mL/min): {dose} mg once daily.",
            "With severe renal impairment {drug} is reduced to {dose} mg once daily.",
        ],
        [
            "pt on dialysis, how much {name}?",
            "my kidneys are failing, what dose of {name}?",
            "eGFR 22, {name} dose?",
            "CKD stage 4 and {name}, mg?",
            "bad kidneys: {name} how many mg",
        ],
        "{dose} mg",
        {"dose": DOSES},
    ),
    "hepatic": Topic(
        [
            "{drug} in hepatic impairment (Child-Pugh C): {dose} mg once daily.",
            "With severe hepatic impairment {drug} is reduced to {dose} mg once daily.",
        ],
        [
            "cirrhosis pt, how much {name}?",
            "my liver is damaged, what dose of {name}?",
            "LFTs through the roof, {name} dose?",
            "liver failure and {name}, mg?",
            "bad liver: {name} how many mg",
        ],
        "{dose} mg",
        {"dose": DOSES},
    ),
    "interaction": Topic(
        ["{drug} must not be combined with {other}.", "Concomitant use of {drug} and {other} is contraindicated."],
        [
            "what can't I take together with {name}?",
            "{name} DDI, which one is forbidden?",
            "which medicine clashes with {name}?",
            "anything that does not mix with {name}?",
            "pt on {name}, what must we not add?",
        ],
        "{other}",
        {"other": OTHERS.split(", ")},
    ),
    "storage": Topic(
        ["Store {drug} below {degrees} °C.", "Storage of {drug}: not above {degrees} °C."],
        [
            "how warm may {name} get in the cupboard?",
            "where do we keep {name}, what temp?",
            "left {name} in a hot car, what is the limit?",
            "{name} temperature limit?",
            "can {name} sit on the window sill? how hot at most",
        ],
        "{degrees} °C",
        {"degrees": (8, 15, 18, 20, 22, 25, 28, 30)},
    ),
    "opened": Topic(
        ["Once opened, {drug} expires after {days} days.", "Discard {drug} {days} days after first opening."],
        [
            "opened my bottle of {name}, how long is it good?",
            "when do I throw away {name} after breaking the seal?",
            "in-use shelf life {name}?",
            "how long can we use a started pack of {name}?",
            "seal broken on {name}, days left?",
        ],
        "{days} days",
        {"days": (7, 10, 14, 21, 28, 30, 42, 56, 60, 90)},
    ),
    "missed": Topic(
        [
            "A missed dose of {drug} may be taken within {hours} hours.",
            "If a dose of {drug} is missed, take it within {hours} hours or skip it.",
        ],
        [
            "forgot my {name} this morning, how long can I still take it?",
            "pt skipped {name}, until when can they catch up?",
            "how late can I be with {name}?",
            "didn't take {name} at breakfast, too late now?",
            "overslept, {name} not taken, how many hrs do I have",
        ],
        "{hours} hours",
        {"hours": HOURS},
    ),
    "common": Topic(
        ["The most frequent adverse reaction to {drug} is {effect}.", "{drug} commonly causes {effect}."],
        [
            "what will I feel from {name}, usually?",
            "commonest ADR of {name}?",
            "does {name} have side effects? the main one?",
            "what do most people on {name} complain about?",
            "typical s/e {name}",
        ],
        "{effect}",
        {"effect": EFFECTS.split(", ")},
    ),
    "warning": Topic(
        ["Stop {drug} at once if {sign} occurs.", "{sign} is a reason to discontinue {drug} immediately."],
        [
            "which symptom on {name} means emergency?",
            "red flag with {name}?",
            "when must I quit {name} right away, what sign?",
            "what should make me call the doctor about {name}?",
            "{name} alarm symptom?",
        ],
        "{sign}",
        {"sign": SIGNS.split(", ")},
    ),
    "breastfeeding": Topic(
        [
            "Breast-feeding: wait {hours} hours after a dose of {drug}.",
            "After {drug} mothers do not breast-feed for {hours} hours.",
        ],
        [
            "nursing mum on {name}, when can baby drink again?",
            "lactation and {name}, how long to wait?",
            "I took {name}, when may I feed my newborn?",
            "pump and dump after {name}, for how long?",
            "{name} and my milk: how many hrs",
        ],
        "{hours} hours",
        {"hours": HOURS},
    ),
    "surgery": Topic(
        ["{drug} is stopped {days} days before surgery.", "Before an operation {drug} is withheld for {days} days."],
        [
            "op next month, when do I quit {name}?",
            "pre-op hold for {name}?",
            "how long off {name} before they cut me open?",
            "hip replacement, when to pause {name}?",
            "{name} perioperative, days?",
        ],
        "{days} days",
        {"days": (2, 3, 4, 5, 6, 7, 8, 10, 12, 14)},
    ),
    "alcohol": Topic(
        [
            "No alcohol for {hours} hours after {drug}.",
            "Avoid alcohol for {hours} hours after taking {drug}.",
        ],
        [
            "glass of wine after {name}, when?",
            "can I have a beer on {name}? how long to wait",
            "{name} and booze, hours between?",
            "party tonight, took {name}, when may I drink?",
            "etoh with {name}?",
        ],
        "{hours} hours",
        {"hours": HOURS},
    ),
    "monitoring": Topic(
        ["Blood counts are checked every {weeks} weeks during {drug}.", "{drug}: blood test every {weeks} weeks."],
        [
            "how often do they draw my blood on {name}?",
            "lab interval {name}?",
            "FBC frequency with {name}?",
            "when is the next lab for a pt on {name}?",
            "{name}: bloods how often",
        ],
        "{weeks} weeks",
        {"weeks": (2, 3, 4, 5, 6, 8, 10, 12, 16, 26)},
    ),
    "onset": Topic(
        ["{drug} acts within {minutes} minutes.", "The effect of {drug} sets in after {minutes} minutes."],
        [
            "how fast does {name} kick in?",
            "when will I feel {name} working?",
            "onset of {name}?",
            "took {name}, still nothing, how long does it need?",
            "{name} works after how long",
        ],
        "{minutes} minutes",
        {"minutes": (5, 10, 15, 20, 25, 30, 40, 45, 50, 60, 90)},
    ),
}


class Medicine(NamedTuple):
    """An invented medicine."""

    generic: str
    brand: str


class PharmacyRetrieval(Retrieval):
    """The task of this module: that of `retrieval`, with a generator."""

    name = "pharmacy_retrieval"

    def generate(self, rows: int, seed: int) -> Iterator[dict[str, Any]]:
        """Yield raw rows, a medicine after the other; the slices say what is asked and how the medicine is named.

        Raises:
            RecipeError: There are not that many medicines.
        """
        if rows > MAX_MEDICINES * TOPICS_EACH:
            raise RecipeError(
                f"the generator knows {MAX_MEDICINES * TOPICS_EACH:,} questions",
                where="data.rows",
                fix="ask for fewer rows",
            )
        rng = random.Random(seed)
        made = medicines(rng)
        written = 0
        while written < rows:
            medicine = next(made)
            for topic in rng.sample(list(TOPICS), TOPICS_EACH):
                row = write(medicine, topic, rng)
                written += 1
                if written <= rows:
                    yield row


TASK = PharmacyRetrieval()


def medicines(rng: random.Random) -> Iterator[Medicine]:
    """Yield medicines without end, no name twice; the second of each two has a generic name like the first's."""
    seen: set[str] = set()

    def new(draw: Callable[[], str]) -> str:
        while (name := draw()) in seen:
            pass
        seen.add(name)
        return name

    def brand() -> str:
        return "".join(_syllable(rng, some) for some in (BRAND_STARTS, BRAND_MIDDLES, BRAND_ENDS))

    while True:
        start, end = _syllable(rng, STARTS), _syllable(rng, ENDS)
        for _ in range(2):
            generic = new(lambda: start + _syllable(rng, MIDDLES) + _syllable(rng, MIDDLES) + end)  # noqa: B023
            yield Medicine(generic, new(brand))


def _syllable(rng: random.Random, some: str) -> str:
    return rng.choice(some.split())


def write(medicine: Medicine, topic: str, rng: random.Random) -> dict[str, Any]:
    """Return the row of one fact of a medicine."""
    said = TOPICS[topic]
    values = {name: rng.choice(list(choices)) for name, choices in said.values.items()}
    passage = rng.choice(said.passages).format(drug=f"{medicine.generic} (brand {medicine.brand})", **values)
    how = rng.choices(list(NAME_SHARES), list(NAME_SHARES.values()))[0]
    name = medicine.generic if how == "generic" else medicine.brand
    if how == "misspelt":
        name = misspell(rng.choice(medicine), rng)
    question = rng.choice(said.questions).format(name=name if rng.random() < 0.3 else name.lower())
    turns = [
        ("system", passage[:1].upper() + passage[1:]),
        ("user", question),
        ("assistant", said.answer.format(**values)),
    ]
    return {
        "messages": [{"role": role, "content": text} for role, text in turns],
        "group": medicine.generic,
        "slices": {"about": topic, "name": how},
    }


def misspell(name: str, rng: random.Random) -> str:
    """Return a name with one slip after its first letter: two letters exchanged, one left out, or one doubled."""
    at = rng.randrange(1, len(name) - 1)
    slips = [
        name[:at] + name[at + 1] + name[at] + name[at + 2 :],
        name[:at] + name[at + 1 :],
        name[: at + 1] + name[at:],
    ]
    return rng.choice([slip for slip in slips if slip != name])
