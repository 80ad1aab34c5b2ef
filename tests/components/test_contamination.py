"""Contamination of evaluation rows by training rows: by hand, and against a slow reference on random texts."""

import random
import re
from typing import Any

import pyarrow as pa
import pytest

from assay.components.contracts.errors import DataError
from assay.components.contracts.recipe import DataSettings
from assay.components.contracts.rows import Example, Message
from assay.components.prepare_data.prepare import prepare
from assay.components.prepare_data.writing import describe_answers, summarise
from assay.components.shared import contamination
from assay.components.shared.contamination import COMMON, NEAR, N, contaminated, find_contamination

LONG = "please tell me how many tablets of this medicine a grown person may take in one whole day at most"


def row(name: str, text: str, system: str = "", group: str = "") -> Example:
    turns = [Message(role="system", content=system)] if system else []
    return Example(id=name, group=group or name, prompt=[*turns, Message(role="user", content=text)], reference="x")


def table(rows: list[Example]) -> pa.Table:
    return pa.Table.from_pylist([one.model_dump() for one in rows], schema=Example.SCHEMA)


def found(training: list[Example], test: list[Example], **others: list[Example]) -> Any:
    splits = {"sft": training, "test": test, **others}
    return find_contamination({name: table(rows) for name, rows in splits.items()})


def counts(training: list[str], test: list[str]) -> tuple[int, int, int]:
    rows = [
        [row(f"{side}{place}", text) for place, text in enumerate(texts)] for side, texts in enumerate((training, test))
    ]
    told = found(*rows).counts["test"]
    assert told["rows"] == len(test)
    return told["exact"], told["near"], told["overlapping"]


def test_equal_texts_are_found_whatever_their_case_width_and_white_space():
    assert counts(["Is it  safe?\n"], ["is it safe?", "ＩＳ it safe?", "is it safe"]) == (2, 1, 0)


def test_a_short_text_is_compared_whole():
    assert counts(["take two tablets a day"], ["take two tablets a day with water"]) == (0, 0, 0)
    assert counts(["take two tablets a day with water"], ["take two tablets a day"]) == (0, 0, 0)
    assert counts(["Take two tablets (a day)!"], ["take two tablets a day"]) == (0, 1, 0)


def test_a_long_text_with_a_word_more_is_nearly_the_same():
    assert len(LONG.split()) == 20
    assert counts([LONG], [f"{LONG} please"]) == (0, 1, 0)
    assert counts([LONG], [f"{LONG} and what happens if that person takes twice as many of them"]) == (0, 0, 1)
    broken = LONG.split()
    broken[10] = "old"  # no run of 13 is left
    assert counts([LONG], [" ".join(broken)]) == (0, 0, 0)


def test_examples_name_both_rows_the_worst_first():
    test = [row("t1", f"{LONG} please"), row("t2", LONG), row("t3", "nothing of that")]
    told = found([row("s1", "other"), row("s2", LONG)], test, rl=[row("r1", LONG)])
    assert told.examples == [
        {"split": "test", "id": "t2", "kind": "exact", "covered": 1.0, "training_split": "sft", "training_id": "s2"},
        {"split": "test", "id": "t1", "kind": "near", "covered": 0.952, "training_split": "sft", "training_id": "s2"},
    ]


def test_every_training_split_is_compared_with_every_evaluation_split():
    told = found(
        [row("s", "one")],
        [row("t", "two"), row("u", "three")],
        preference=[row("p", "two")],
        rl=[row("r", "three")],
        validation=[row("v", "ONE"), row("w", "four")],
    )
    assert told.counts["test"]["exact"] == 2
    assert told.counts["validation"]["exact"] == 1
    assert {one["training_split"] for one in told.examples} == {"sft", "preference", "rl"}


def test_a_system_turn_that_all_rows_have_is_no_question():
    same = " ".join(f"rule{place}" for place in range(30))
    test = [row(f"t{place}", f"question {place}", system=same) for place in range(COMMON + 1)]
    told = found([row("s", "question 3", system="another prompt"), row("u", "else", system=same)], test)
    assert told.counts["test"] == {"rows": COMMON + 1, "exact": 0, "near": 0, "overlapping": 0}
    told = found([row("s", "question 3", system=same)], test)
    assert told.counts["test"]["exact"] == 1


def test_a_passage_of_its_own_is_part_of_the_question():
    test = [row("t", "how much for adults?", system="Velmorin: 5 mg.")]
    assert found([row("s", "how much for adults?", system="Axilto: 9 mg.")], test).counts["test"]["exact"] == 0
    assert found([row("s", "how much for adults?", system="velmorin: 5 mg.")], test).counts["test"]["exact"] == 1


def test_the_form_of_the_questions_does_not_count_but_copies_in_training_do():
    form = " ".join(f"form{place}" for place in range(20))
    test = [row(f"t{place}", f"{form} about thing{place}") for place in range(COMMON + 1)]
    assert found([row("s", f"{form} about another")], test).counts["test"]["overlapping"] == 0
    one = [row("t", f"{LONG} please")]
    many = [row(f"s{place}", f"{LONG} number {place}") for place in range(5 * COMMON)]
    assert found(many, one).counts["test"]["near"] == 1


def slow(training: list[str], test: list[str]) -> tuple[int, int, int]:
    """The definition, word by word."""

    def tokens(text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())

    def runs(words: list[str]) -> list[tuple[int, tuple[str, ...]]]:
        size = min(N, len(words))
        return [(at, tuple(words[at : at + size])) for at in range(len(words) - size + 1)] if words else []

    known = {run for text in training for _, run in runs(tokens(text))}
    often: dict[tuple[str, ...], int] = {}
    for text in test:
        for _, run in runs(tokens(text)):
            often[run] = often.get(run, 0) + 1
    exact = near = overlapping = 0
    folded = {" ".join(text.lower().split()) for text in training}
    for text in test:
        words = tokens(text)
        inside = {
            at + step
            for at, run in runs(words)
            if run in known and (often[run] <= COMMON or len(run) == len(words))
            for step in range(len(run))
        }
        share = len(inside) / max(1, len(words))
        if " ".join(text.lower().split()) in folded:
            exact += 1
        elif share >= NEAR:
            near += 1
        elif share > 0:
            overlapping += 1
    return exact, near, overlapping


@pytest.mark.parametrize("seed", range(20))
def test_columns_agree_with_the_slow_reference(seed, monkeypatch):
    monkeypatch.setattr(contamination, "BLOCK", 150)
    rng = random.Random(seed)
    words = ["a", "b", "c", "dose", "5", "Mg", "é"]

    def text(longest: int = 40) -> str:
        return " ".join(rng.choices(words, k=rng.randint(0, longest)))

    training = [text() for _ in range(40)]
    test = [text() for _ in range(10)]
    for _ in range(20):
        origin = rng.choice(training)
        test.append(rng.choice([origin, origin + " " + text(6), text(30) + " " + origin, origin.upper() + " "]))
    test = [one or "-" for one in test]
    training = [one or "-" for one in training]
    assert counts(training, test) == slow(training, test)


def test_no_row_at_all_is_no_contamination():
    assert counts(["a b c"], ["..."]) == (0, 0, 0)
    assert found([], [row("t", "a")]).counts["test"]["exact"] == 0


def test_documents_that_hold_a_question_are_told_and_others_are_not():
    test = [row("t", LONG), row("u", "two tablets"), row("v", "what is never said")]
    documents = [
        f"Chapter one. {LONG} And so on, for many pages.",
        "two tablets",
        "two tablets with water",  # two words stand side by side by chance
        "A chapter that only says: " + " ".join(LONG.split()[:12]),
        " ".join(LONG.split()[5:] + ["again"]),  # a part of what is covered elsewhere
    ]
    assert contaminated(documents, {"test": table(test)}) == [True, True, False, False, True]
    assert contaminated(documents[2:4], {"test": table(test)}) == [False, False]
    assert contaminated([], {"test": table(test)}) == []


def test_a_short_question_is_found_anywhere_in_a_document():
    test = [row("t", "What is a building permit?"), row("u", "When may a house be painted red again"), row("v", LONG)]
    documents = [
        "Questions. What is a building permit? It is a decision of the municipality.",
        "- When may a house be painted\n  red again? Never.",
        "A building permit is what is given for a house, and may be painted red again.",
        "What is a building? Permit me to say.",
    ]
    assert contaminated(documents, {"test": table(test)}) == [True, True, False, True]


def split_rows() -> list[Example]:
    """Two hundred questions, and one that two groups ask in different cases."""
    return [row(f"{place:03}", f"question {place}", group=f"g{place}") for place in range(200)]


def twins() -> list[Example]:
    """Rows whose groups put equal texts on both sides."""
    plain = prepare(table(split_rows()), DataSettings(min_test_rows=1)).splits
    held = plain["test"].to_pylist()[0]
    seen = plain["sft"].to_pylist()[0]
    copy = row("twin", held["prompt"][0]["content"].upper(), group=seen["group"])
    return [*split_rows(), copy]


def test_a_test_question_that_another_group_trains_on_stops_the_run():
    with pytest.raises(DataError, match=r"1 of \d+ rows of test have a training row's text") as caught:
        prepare(table(twins()), DataSettings(min_test_rows=1))
    assert "sft: row twin" in caught.value.where
    assert "same group" in caught.value.fix


def test_more_may_be_allowed_and_is_told():
    prepared = prepare(table(twins()), DataSettings(min_test_rows=1, max_contamination=0.1))
    told: Any = summarise(prepared)
    assert told.details["contamination"]["counts"]["test"]["exact"] == 1
    assert told.details["contamination"]["examples"][0]["training_id"] == "twin"
    assert "equal and nearly: validation 0 and 0 of" in told.headline
    assert told.metrics["contaminated_test"] == 1


def test_the_shape_of_answers_tells_labels_and_reading_from_writing():
    rows = [
        row(f"{n}", f"q{n}", system=f"Store {n} at 25 °C.").model_copy(update={"reference": "25 °c"}) for n in range(8)
    ]
    assert describe_answers(table(rows)) == {"distinct": 1, "rarest": 8, "read_off": 1.0, "contexts": 1.0}
    free = [row(f"{n}", f"q{n}").model_copy(update={"reference": f"answer {n}"}) for n in range(8)]
    assert describe_answers(table(free)) == {"distinct": 8, "rarest": 1, "read_off": 0.0, "contexts": 0.125}
