"""Product listings: the planted label is the one that a reader of the listing alone would give."""

import re
from collections import Counter, defaultdict
from itertools import islice

import pytest

from assay.components.contracts.errors import DataError
from assay.components.contracts.rows import Message
from assay.components.shared.calibration import BRIER, ECE
from assay.components.shared.tasks.product_content import KINDS, LABEL_SHARES, normalise
from assay.components.shared.tasks.task import get_task

TASK = get_task("product_content")
ROWS = list(TASK.generate(2500, 0))
FACTORS = {"ml": ("volume", 1), "l": ("volume", 1000), "g": ("weight", 1), "kg": ("weight", 1000)}
FACTORS |= {"cm": ("length", 1), "m": ("length", 100), "W": ("power", 1), "mAh": ("capacity", 1)}
MEASURES = {measure for measure, _ in FACTORS.values()}
QUANTITY = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?) ([A-Za-z]+)\b")
COLOURS = {"black", "white", "red", "blue", "green", "grey", "yellow", "orange", "purple", "brown"}
CURE = re.compile(
    r"\b(Cures|Heals|Proven to cure|Makes|Ends) (back pain|headaches|insomnia|stress|colds|joint|allerg|migr|anx)"
)
BOAST = re.compile(r"best .+ in the world|best .+ there is|world's number one|comes close to it|every other .+ market")


KNOWN_BRANDS = {found for row in ROWS for found in re.findall(r"brand: (\w+)", row["messages"][1]["content"])}


def label_of(text: str) -> str:
    """Return the label by reading the listing, with none of the generator's code: every rule is tried."""
    title, attributes, body = re.fullmatch(r"Title: (.*)\nAttributes: (.*)\nDescription: (.*)", text).groups()
    facts = dict(one.split(": ") for one in attributes.split("; "))
    broken = set()
    measures = MEASURES & facts.keys()
    if len(measures) != 1 or not {"brand", "colour", "material"} <= facts.keys():
        broken.add("missing_attribute")
    prose = f"{title}. {body}"
    said = [(float(number), unit) for number, unit in QUANTITY.findall(prose) if unit in FACTORS or not measures]
    for measure in measures:
        number, unit = facts[measure].split()
        if FACTORS.get(unit, ("",))[0] != measure:
            broken.add("wrong_unit")
            assert all(f"{value:g} {other}" == facts[measure] for value, other in said), text
        elif any(
            FACTORS[other][0] != measure or abs(value * FACTORS[other][1] - float(number) * FACTORS[unit][1]) > 1e-6
            for value, other in said
        ):
            broken.add("contradiction")
    words = set(re.findall(r"[a-z]+", prose.lower()))
    materials = {one for kind in KINDS.values() for one in kind.materials}
    if "colour" in facts and (words & COLOURS) - {facts["colour"]}:
        broken.add("contradiction")
    named = {one for one in materials if re.search(rf"\b{one}\b", prose.lower().replace("glass of", ""))}
    if "material" in facts and named - {facts["material"]}:
        broken.add("contradiction")
    if "brand" in facts and (set(title.split()) & KNOWN_BRANDS) - {facts["brand"]}:
        broken.add("contradiction")
    if CURE.search(body) or BOAST.search(body):
        broken.add("forbidden_claim")
    assert len(broken) <= 1, (broken, text)
    return broken.pop() if broken else "publish"


def text_of(row: dict) -> str:
    return row["messages"][1]["content"]


def test_every_label_follows_from_the_listing_alone() -> None:
    wrong = [(row["messages"][-1]["content"], text_of(row)) for row in ROWS]
    wrong = [(label, text) for label, text in wrong if label_of(text) != label]
    assert not wrong, "\n\n".join(f"{label} / {label_of(text)}\n{text}" for label, text in wrong[:3])


def test_a_rows_parts_are_the_tasks_own_prompt_and_a_label() -> None:
    for row in ROWS[:50]:
        turns = [Message(**turn) for turn in row["messages"]]
        assert turns[:2] == TASK.prompt(turns[1].content)
        assert turns[2].content in LABEL_SHARES
        assert turns[2].content in turns[0].content  # the rubric names it
        assert row["slices"] in (["difficulty=easy"], ["difficulty=hard"])
    assert max(len(text_of(row)) for row in ROWS) < 500


def test_labels_difficulties_and_types_are_balanced() -> None:
    labels = Counter(row["messages"][-1]["content"] for row in ROWS)
    for label, share in LABEL_SHARES.items():
        assert labels[label] / len(ROWS) == pytest.approx(share, abs=0.03)  # three standard errors
    by_label = defaultdict(Counter)
    types = Counter()
    for row in ROWS:
        reference = row["messages"][-1]["content"]
        by_label[reference][row["slices"][0]] += 1
        slices = TASK.slices([Message(**turn) for turn in row["messages"][:2]], reference)
        assert slices[0] == f"label={reference}"
        types[slices[1]] += 1
    assert types.keys() == {f"type={name}" for name in KINDS}
    assert min(types.values()) > len(ROWS) / len(KINDS) / 2
    assert all(
        counts["difficulty=hard"] / counts.total() == pytest.approx(0.4, abs=0.09) for counts in by_label.values()
    )


def test_no_label_is_told_by_the_type_or_the_extras_alone() -> None:
    """A listing's shape must not give the label away: every type and extra has every label."""
    harmless = ["best rinsed by hand", "not a medical product", "cures nothing", "about pain or sleep"]
    for mark in [*(kind.nouns[0] for kind in KINDS.values()), "warranty", "origin", "season", *harmless]:
        found = Counter(row["messages"][-1]["content"] for row in ROWS if mark in text_of(row).lower())
        assert found.keys() == LABEL_SHARES.keys(), mark


def test_a_measure_in_two_units_and_another_products_unit_tell_no_label() -> None:
    two = Counter()
    for row in ROWS:
        said = {(number, unit) for number, unit in QUANTITY.findall(text_of(row)) if unit in FACTORS}
        if len({unit for _, unit in said}) > 1:
            two[row["messages"][-1]["content"]] += 1
    assert {"publish", "missing_attribute", "forbidden_claim"} <= two.keys()
    assert two["publish"] < 0.75 * two.total()


def test_rows_are_the_seeds_and_stable_in_a_prefix() -> None:
    assert list(TASK.generate(200, 0)) == ROWS[:200]
    assert list(islice(TASK.generate(50, 1), 50)) != ROWS[:50]
    groups = {TASK.group([Message(**turn) for turn in row["messages"][:2]]) for row in ROWS}
    assert len(groups) == len(ROWS)


def test_a_group_is_a_listing_however_its_attributes_stand() -> None:
    one = "Title: Red lamp\nAttributes: colour: red; brand: Kestrel\nDescription: Gives warm light."
    other = "Title: RED  lamp\nAttributes: brand: Kestrel; colour: red\nDescription: Gives warm light. "
    assert normalise(one) == normalise(other)
    assert normalise(one) != normalise(one.replace("red;", "blue;"))


@pytest.mark.parametrize(
    ("response", "reference", "exact", "passed", "held", "valid"),
    [
        ("publish", "publish", 1, None, 0, 1),
        ("wrong_unit", "publish", 0, None, 1, 1),
        ("publish", "wrong_unit", 0, 1, None, 1),
        (" wrong_unit\n", "wrong_unit", 1, 0, None, 1),
        ("contradiction", "wrong_unit", 0, 0, None, 1),
        ("Publish it.", "publish", 0, None, 0, 0),
        ("It is fine.", "wrong_unit", 0, 1, None, 0),
    ],
)
def test_scores(response: str, reference: str, exact: int, passed: int | None, held: int | None, valid: int) -> None:
    assert TASK.score(response, reference) == {
        "exact": exact,
        "passed_bad": passed,
        "held_good": held,
        "valid": valid,
    }
    assert TASK.reward(response, reference) == exact
    assert TASK.reward(response, reference, finished=False) == 0


def test_a_reference_that_is_no_label_is_refused() -> None:
    with pytest.raises(DataError, match="no label of a listing: 'fine'"):
        TASK.score("publish", "fine")
    assert [metric.name for metric in TASK.metrics][-2:] == [BRIER.name, ECE.name]
