"""Product listings to one quality label: what a marketplace asks before a listing goes live.

    Title: Alpenglow flask, 750 ml
    Attributes: brand: Alpenglow; colour: blue; material: steel; volume: 700 ml
    Description: Keeps drinks cold for a day.
    → contradiction

The rubric stands in the system turn; it has one rule for each label but `publish`, and no listing breaks two. A listing
names the same thing in three places, so that the hard cases are of places that nearly agree:

* `missing_attribute`  one of brand, colour, material and the measure is not among the attributes; hard: title or
                       description name it all the same
* `contradiction`      title or description and the attributes disagree; hard: about the measure, by one step
* `wrong_unit`         the measure has a unit of another kind, in every place; hard: one of another product
* `forbidden_claim`    the description promises a cure, or calls the product the best
* `publish`            none of these

Hard listings of every label are longer, and have words of a claim that claim nothing or a measure in two units that
agree: neither tells a label.

The listings are synthetic and the label is planted, so that it is without noise; brands are invented. Labelled listings
that may be passed on do not exist in number: the package `evals` has 433 rows, of matching products, not of quality.
"""

import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ...contracts.errors import DataError, RecipeError
from ...contracts.metrics import Metric
from ...contracts.rows import Message
from ..calibration import BRIER, ECE

SYSTEM = """Check the product listing and reply with one label.
missing_attribute: the attributes lack brand, colour, material or the measure.
contradiction: title or description disagree with the attributes.
wrong_unit: the unit cannot measure what it stands for.
forbidden_claim: it promises a cure or calls itself the best.
publish: none of these."""
LABEL_SHARES = {
    "publish": 0.4,
    "missing_attribute": 0.15,
    "contradiction": 0.15,
    "wrong_unit": 0.15,
    "forbidden_claim": 0.15,
}
"""Label to its share of the generated rows."""
GOOD = "publish"
HARD_SHARE = 0.4
MAX_ATTEMPTS = 1_000
"""Draws in a row that only repeat known listings before the generator says that there are no more."""

BRANDS = [
    "Alpenglow", "Bexley", "Corvano", "Dunmere", "Elvora", "Fennik", "Grisham", "Halden", "Ivarra", "Jorvik",
    "Kestrel", "Lumora", "Marrow", "Nordal", "Orlena", "Pinecroft", "Quillon", "Rosmer", "Solvik", "Tarrant",
    "Umbral", "Vantor", "Wexford", "Yarrow", "Zephira",
]  # fmt: skip
COLOURS = ["black", "white", "red", "blue", "green", "grey", "yellow", "orange", "purple", "brown"]


class Kind(NamedTuple):
    """A type of product."""

    nouns: tuple[str, ...]
    measure: str
    unit: str
    values: tuple[float, ...]
    materials: tuple[str, ...]
    uses: tuple[str, ...]


KINDS = {
    "bottle": Kind(
        ("water bottle", "flask", "drinking bottle"), "volume", "ml", (250, 330, 500, 600, 750, 900),
        ("steel", "glass", "aluminium", "plastic"), ("Keeps drinks cold for a day.", "Fits the cup holder of a car."),
    ),
    "kettle": Kind(
        ("kettle", "water kettle"), "volume", "l", (0.8, 1, 1.2, 1.5, 1.7, 2),
        ("steel", "glass", "plastic"), ("Switches itself off.", "Pours without dripping."),
    ),
    "backpack": Kind(
        ("backpack", "rucksack", "daypack"), "volume", "l", (12, 18, 20, 25, 30, 40),
        ("nylon", "canvas", "leather"), ("Has a pocket for a laptop.", "The straps are padded."),
    ),
    "paint": Kind(
        ("wall paint", "indoor paint"), "volume", "l", (1, 2.5, 5, 7.5, 10),
        ("acrylic", "latex", "chalk"), ("Covers in one coat.", "Dries within two hours."),
    ),
    "shampoo": Kind(
        ("shampoo bar", "soap bar", "hand soap"), "weight", "g", (60, 80, 100, 120, 150),
        ("olive oil", "coconut oil", "shea butter"), ("Smells of lavender.", "Wrapped in paper."),
    ),
    "candle": Kind(
        ("candle", "scented candle"), "weight", "g", (90, 120, 180, 220, 300, 400),
        ("soy wax", "beeswax", "paraffin"), ("Burns for many hours.", "Comes in a tin."),
    ),
    "dumbbell": Kind(
        ("dumbbell", "hand weight"), "weight", "kg", (1, 2, 3, 5, 8, 10),
        ("iron", "rubber", "neoprene"), ("Does not roll away.", "The grip is rough."),
    ),
    "rope": Kind(
        ("rope", "climbing rope", "washing line"), "length", "m", (5, 10, 15, 20, 30, 50),
        ("hemp", "nylon", "cotton"), ("Holds knots well.", "The ends are sealed."),
    ),
    "cable": Kind(
        ("extension cable", "charging cable"), "length", "m", (0.5, 1, 1.5, 2, 3, 5),
        ("rubber", "nylon", "plastic"), ("Bends without a kink.", "A hook for hanging is included."),
    ),
    "towel": Kind(
        ("bath towel", "towel", "beach towel"), "length", "cm", (90, 100, 120, 140, 160, 180),
        ("cotton", "linen", "bamboo"), ("Dries quickly.", "Soft from the first wash."),
    ),
    "rug": Kind(
        ("rug", "carpet", "door mat"), "length", "cm", (60, 80, 120, 150, 200, 240),
        ("wool", "jute", "cotton"), ("Lies flat at once.", "The back does not slip."),
    ),
    "lamp": Kind(
        ("desk lamp", "lamp", "reading lamp"), "power", "W", (5, 8, 12, 15, 20, 40),
        ("steel", "oak", "brass"), ("The arm turns freely.", "Gives warm light."),
    ),
    "fan": Kind(
        ("fan", "table fan"), "power", "W", (18, 25, 30, 45, 60, 75),
        ("steel", "plastic", "bamboo"), ("Runs quietly.", "Has three speeds."),
    ),
    "battery": Kind(
        ("power bank", "battery pack"), "capacity", "mAh", (5000, 8000, 10000, 15000, 20000, 26800),
        ("aluminium", "plastic", "rubber"), ("Charges two devices.", "A light shows what is left."),
    ),
}  # fmt: skip
EXTRAS = {
    "origin": ("Portugal", "Vietnam", "Poland", "Mexico", "Turkey"),
    "pack": ("1", "2", "4", "6"),
    "warranty": ("1 year", "2 years", "3 years"),
    "season": ("all year", "summer", "winter"),
}
"""Attributes that no rule asks for."""
LARGER = {"ml": ("l", 1000), "g": ("kg", 1000), "cm": ("m", 100)}
"""Unit to a larger one of its kind and how many go into it."""
UNITS = {"volume": ("ml", "l"), "weight": ("g", "kg"), "length": ("cm", "m"), "power": ("W",), "capacity": ("mAh",)}
FOREIGN = ("GB", "mph", "dB", "Hz", "km/h", "minutes")
"""Units that no product has."""
ILLS = ("back pain", "headaches", "insomnia", "stress", "colds", "joint pain", "allergies", "migraine", "anxiety")
CURES = (
    "Cures {}.",
    "Heals {} overnight.",
    "Proven to cure {}.",
    "Makes {} disappear for good.",
    "Ends {} within days.",
)
PRAISE = (
    "The best {} in the world.",
    "Simply the best {} there is.",
    "The world's number one {}.",
    "No other {} comes close to it.",
    "Better than every other {} on the market.",
)
HARMLESS = (
    "Best rinsed by hand.",
    "Number 1 on the label marks the lot.",
    "Not a medical product.",
    "It cures nothing and promises nothing.",
    "Store in the best-aired corner of the room.",
    "The world map on the box is recycled paper.",
    "We make no claim about pain or sleep.",
    "The other parts come in a second box.",
)
"""Words of claims that claim nothing."""
FILLERS = (
    "Ships within two days.",
    "Gift wrapping is available.",
    "Designed in a small studio.",
    "The box can be recycled.",
    "Easy to clean.",
    "A manual is included.",
    "Also sold as a set.",
    "New in our range this year.",
)


class Product(NamedTuple):
    """What is sold, as it is."""

    kind: str
    noun: str
    facts: dict[str, str]
    """Brand, colour, material and the measure, by the attribute's name."""


class Draft(NamedTuple):
    """A listing in parts, before it is written."""

    attributes: dict[str, str]
    title: dict[str, str]
    """The facts that the title names."""
    body: dict[str, str]
    """The facts that the description names."""
    remarks: list[str]
    """What the description says besides: a claim, or what only sounds like one."""


class ProductContent:
    """The task of this module; see there for the labels and their meaning."""

    name = "product_content"
    metrics: Sequence[Metric] = (
        Metric(name="exact", title="Exact", better="higher", definition="The answer is the listing's label."),
        Metric(
            name="passed_bad",
            title="Bad listings passed",
            better="lower",
            definition="A listing that breaks a rule and is answered with none of the rules' labels; an answer that "
            "cannot be read counts as one, for it stops nothing. Bad listings only.",
        ),
        Metric(
            name="held_good",
            title="Good listings held",
            better="lower",
            definition="A listing that breaks no rule and is answered with a rule's label. Good listings only.",
        ),
        Metric(name="valid", title="Valid label", better="higher", definition="The answer is one of the labels."),
        BRIER,
        ECE,
    )

    def prompt(self, text: str) -> list[Message]:
        """Return the conversation that asks for the label of one listing."""
        return [Message(role="system", content=SYSTEM), Message(role="user", content=text)]

    def group(self, prompt: Sequence[Message]) -> str:
        """Return the listing in normal form: Unicode width, case, white space and the order of the attributes."""
        return normalise(next(turn.content for turn in reversed(prompt) if turn.role == "user"))

    def slices(self, prompt: Sequence[Message], reference: str) -> list[str]:
        """Return label and type of product; the generator's own rows say their difficulty besides.

        Raises:
            DataError: The reference is no label.
        """
        text = next(turn.content for turn in reversed(prompt) if turn.role == "user").casefold()
        title = text.partition("\n")[0]
        kind = next((name for name, one in KINDS.items() if any(noun in title for noun in one.nouns)), "other")
        return [f"label={_label(reference)}", f"type={kind}"]

    def score(self, response: str, reference: str) -> dict[str, float | None]:
        """Return the value of every metric of the text alone; None where it does not apply.

        Raises:
            DataError: The reference is no label.
        """
        wanted, got = _label(reference), response.strip()
        held = got in LABEL_SHARES and got != GOOD
        return {
            "exact": float(got == wanted),
            "passed_bad": None if wanted == GOOD else float(not held),
            "held_good": float(held) if wanted == GOOD else None,
            "valid": float(got in LABEL_SHARES),
        }

    def reward(self, response: str, reference: str, finished: bool = True) -> float:
        """Return 1 for the right label that ended by itself, else 0."""
        return float(finished and self.score(response, reference)["exact"] == 1)

    def generate(self, rows: int, seed: int) -> Iterator[dict[str, Any]]:
        """Yield raw rows, no two of one group, with their difficulty as a slice.

        Raises:
            RecipeError: There are not that many different listings.
        """
        rng = random.Random(seed)
        seen: set[str] = set()
        for _ in range(rows):
            label, hard, text = self._new(rng, seen)
            turns = [*self.prompt(text), Message(role="assistant", content=label)]
            yield {
                "messages": [turn.model_dump() for turn in turns],
                "slices": [f"difficulty={'hard' if hard else 'easy'}"],
            }

    def _new(self, rng: random.Random, seen: set[str]) -> tuple[str, bool, str]:
        for _ in range(MAX_ATTEMPTS):
            label = rng.choices(list(LABEL_SHARES), list(LABEL_SHARES.values()))[0]
            hard = rng.random() < HARD_SHARE
            text = write(draw(rng), label, hard, rng)
            if (key := normalise(text)) not in seen:
                seen.add(key)
                return label, hard, text
        raise RecipeError(
            f"the generator knows no more than about {len(seen)} different listings",
            where="data.rows",
            fix="ask for fewer rows",
        )


TASK = ProductContent()


def draw(rng: random.Random) -> Product:
    """Return a random product."""
    name = rng.choice(list(KINDS))
    kind = KINDS[name]
    facts = {
        "brand": rng.choice(BRANDS),
        "colour": rng.choice(COLOURS),
        "material": rng.choice(kind.materials),
        kind.measure: f"{rng.choice(kind.values):g} {kind.unit}",
    }
    return Product(name, rng.choice(kind.nouns), facts)


def write(product: Product, label: str, hard: bool, rng: random.Random) -> str:
    """Return a listing of a product that breaks the label's rule and no other.

    Args:
        product: What is sold.
        label: One of `LABEL_SHARES`.
        hard: Write the label's hard case (see the module's text).
        rng: Draws the places, the order and the words.
    """
    kind = KINDS[product.kind]
    facts = dict(product.facts)
    if label == "wrong_unit":
        others = [unit for measure, units in UNITS.items() if measure != kind.measure for unit in units]
        unit = rng.choice(others if hard else FOREIGN)
        facts[kind.measure] = f"{facts[kind.measure].split()[0]} {unit}"
    title = {name: facts[name] for name in facts if rng.random() < (0.8 if name == "brand" else 0.45)}
    body = {name: facts[name] for name in facts if name != "brand" and rng.random() < 0.3}
    draft = Draft(facts, title, body, [])
    if label == "missing_attribute":
        draft = _without(draft, rng.choice(list(facts)), hard, rng)
    elif label == "contradiction":
        draft = _disagreeing(draft, kind, hard, rng)
    elif label == "forbidden_claim":
        draft = draft._replace(remarks=[_claim(product, rng)])
    if hard:
        converts = label != "wrong_unit" and kind.measure in draft.attributes and label != "contradiction"
        draft = _nearly_bad(draft, kind, converts, rng)
    return _written(product, draft, crowded=hard, rng=rng)


def _without(draft: Draft, name: str, hard: bool, rng: random.Random) -> Draft:
    """Drop an attribute; title and description name it only in the hard case."""
    attributes = {key: value for key, value in draft.attributes.items() if key != name}
    title = {key: value for key, value in draft.title.items() if key != name}
    body = {key: value for key, value in draft.body.items() if key != name}
    if hard:
        (title if name == "brand" or rng.random() < 0.5 else body)[name] = draft.attributes[name]
    return Draft(attributes, title, body, [])


def _disagreeing(draft: Draft, kind: Kind, hard: bool, rng: random.Random) -> Draft:
    """Let title or description name another colour, material or brand; in the hard case the next measure."""
    name = kind.measure if hard else rng.choice(["brand", "colour", "material"])
    if hard:
        place = [f"{value:g}" for value in kind.values].index(draft.attributes[name].split()[0])
        beside = [kind.values[other] for other in (place - 1, place + 1) if 0 <= other < len(kind.values)]
        value = f"{rng.choice(beside):g} {kind.unit}"
    else:
        every = {"brand": BRANDS, "colour": COLOURS, "material": kind.materials}[name]
        value = rng.choice([one for one in every if one != draft.attributes[name]])
    title, body = dict(draft.title), dict(draft.body)
    (title if name == "brand" or rng.random() < 0.5 else body)[name] = value
    return Draft(draft.attributes, title, body, [])


def _claim(product: Product, rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(CURES).format(rng.choice(ILLS))
    return rng.choice(PRAISE).format(product.noun)


def _nearly_bad(draft: Draft, kind: Kind, converts: bool, rng: random.Random) -> Draft:
    """Name the measure in another unit, or use a claim's words without its claim; or neither."""
    if rng.random() < 0.5:
        return draft._replace(remarks=[*draft.remarks, rng.choice(HARMLESS)])
    if kind.unit not in LARGER or not converts:
        return draft
    unit, count = LARGER[kind.unit]
    value = f"{float(draft.attributes[kind.measure].split()[0]) / count:g} {unit}"
    if rng.random() < 0.5:
        return draft._replace(title={**draft.title, kind.measure: value})
    return draft._replace(body={**draft.body, kind.measure: value})


def _written(product: Product, draft: Draft, *, crowded: bool, rng: random.Random) -> str:
    """Return the text; a crowded one has more attributes and sentences that say nothing."""
    measure = KINDS[product.kind].measure
    named = draft.title
    before = [named[name] for name in ("brand", "colour", "material") if name in named]
    rng.shuffle(before)
    title = " ".join([*before, product.noun])
    if measure in named:
        title = rng.choice([f"{title}, {named[measure]}", f"{title} ({named[measure]})", f"{named[measure]} {title}"])
    attributes = list(draft.attributes.items())
    for name in rng.sample(list(EXTRAS), rng.randint(1, 3) if crowded else rng.randint(0, 1)):
        attributes.append((name, rng.choice(EXTRAS[name])))
    rng.shuffle(attributes)
    sentences = [rng.choice(KINDS[product.kind].uses), *rng.sample(FILLERS, 2 if crowded else rng.randint(0, 1))]
    sentences += [_sentence(name, value, rng) for name, value in draft.body.items()]
    rng.shuffle(sentences)
    for remark in draft.remarks:
        sentences.insert(rng.randint(0, len(sentences)), remark)
    return (
        f"Title: {title[:1].upper()}{title[1:]}\n"
        f"Attributes: {'; '.join(f'{name}: {value}' for name, value in attributes)}\n"
        f"Description: {' '.join(sentences)}"
    )


def _sentence(name: str, value: str, rng: random.Random) -> str:
    forms = {
        "colour": ("Comes in {}.", "The colour is {}."),
        "material": ("Made of {}.", "We chose {} for it."),
        "volume": ("Holds {}.", "The volume is {}."),
        "weight": ("Weighs {}.", "The weight is {}."),
        "length": ("It is {} long.", "The length is {}."),
        "power": ("Draws {}.", "The power is {}."),
        "capacity": ("Stores {}.", "The capacity is {}."),
    }
    return rng.choice(forms[name]).format(value)


def normalise(text: str) -> str:
    """Return the normal form of a listing."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    head, mark, rest = text.partition("attributes: ")
    attributes, second, body = rest.partition(" description: ")
    return head + mark + "; ".join(sorted(re.split(r" ?; ?", attributes))) + second + body


def _label(reference: str) -> str:
    if reference not in LABEL_SHARES:
        raise DataError(
            f"the reference is no label of a listing: {reference[:60]!r}",
            where="reference",
            fix=f"write one of {list(LABEL_SHARES)}",
        )
    return reference
