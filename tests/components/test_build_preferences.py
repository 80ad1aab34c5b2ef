import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as run
from hypothesis import strategies as st
from kfp import dsl

from assay.components.build_preferences.component import build_preferences
from assay.components.build_preferences.pairs import build_pairs, normalise
from assay.components.build_preferences.quality import correlate, histogram, summarise
from assay.components.contracts.artifacts import read_manifest, seal
from assay.components.contracts.errors import DataError
from assay.components.contracts.recipe import PairSettings
from assay.components.contracts.rows import Candidate, PreferencePair, read_rows
from assay.components.shared.summary import read_summary

OPEN = PairSettings(max_length_ratio=100, max_pairs=10_000, min_pairs=1)


def candidate(response: str, score: float | None, source: str = "sampled", **fields: Any) -> dict[str, Any]:
    prompt_id = fields.pop("prompt_id", "p")
    return {
        "prompt_id": prompt_id,
        "group": prompt_id,
        "prompt": [{"role": "user", "content": prompt_id}],
        "response": response,
        "score": score,
        "source": source,
        "rater": "",
        "finished": True,
    } | fields


def build(rows: Iterable[dict[str, Any]], settings: PairSettings = OPEN) -> Any:
    return build_pairs(pa.Table.from_pylist(list(rows), schema=Candidate.SCHEMA), settings)


def only(rows: Iterable[dict[str, Any]], settings: PairSettings = OPEN) -> PreferencePair:
    (pair,) = build(rows, settings).pairs
    return pair  # type: ignore[no-any-return]


def reasons(rows: Iterable[dict[str, Any]], settings: PairSettings = OPEN) -> list[str]:
    built = build(rows, settings)
    assert not built.pairs
    return [reason for _, reason in built.dropped]


candidates = st.lists(
    st.builds(
        candidate,
        response=st.text("ab ", max_size=4),
        score=st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0, math.nan, math.inf, None]), st.floats(0, 1)),
        source=st.sampled_from(["sampled", "reference", "edit", "original", "rating"]),
        prompt_id=st.sampled_from(["p", "q", "r"]),
        rater=st.sampled_from(["", "ann", "bob"]),
        finished=st.booleans(),
    ),
    max_size=25,
)
policies = st.builds(
    PairSettings,
    min_margin=st.sampled_from([0.01, 0.3]),
    max_length_ratio=st.sampled_from([1.0, 2.0, 50.0]),
    max_pairs_per_prompt=st.integers(1, 3),
    max_pairs=st.integers(1, 5),
)


@run(max_examples=300, deadline=None)
@given(rows=candidates, settings=policies)
def test_every_pair_keeps_the_rules(rows: list[dict[str, Any]], settings: PairSettings) -> None:
    built = build(rows, settings)
    per_prompt: dict[str, int] = {}
    for pair in built.pairs:
        assert normalise(pair.chosen) != normalise(pair.rejected)
        assert pair.margin >= settings.min_margin
        assert len(pair.chosen) <= settings.max_length_ratio * len(pair.rejected)
        assert any(
            row["finished"] and row["response"] == pair.chosen and row["source"] not in ("original",)
            for row in rows
            if row["prompt_id"] == pair.prompt_id
        )
        per_prompt[pair.prompt_id] = per_prompt.get(pair.prompt_id, 0) + 1
    ordered = {(pair.prompt_id, normalise(pair.chosen), normalise(pair.rejected)) for pair in built.pairs}
    assert len(ordered) == len(built.pairs)
    assert not any((prompt, rejected, chosen) in ordered for prompt, chosen, rejected in ordered)
    assert len(built.pairs) <= settings.max_pairs
    assert max(per_prompt.values(), default=0) <= settings.max_pairs_per_prompt


@run(max_examples=200, deadline=None)
@given(rows=candidates, settings=policies)
def test_a_prompt_gives_a_pair_or_a_reason(rows: list[dict[str, Any]], settings: PairSettings) -> None:
    built = build(rows, settings)
    told = {pair.prompt_id for pair in built.pairs} | {prompt for prompt, _ in built.dropped}
    assert told == {row["prompt_id"] for row in rows}


@run(max_examples=200, deadline=None)
@given(rows=candidates, settings=policies, order=st.randoms(use_true_random=False))
def test_pairs_do_not_depend_on_the_order_of_the_candidates(
    rows: list[dict[str, Any]], settings: PairSettings, order: Any
) -> None:
    shuffled = order.sample(rows, len(rows))
    assert build(rows, settings) == build(shuffled, settings)


@run(max_examples=200, deadline=None)
@given(one=st.floats(0, 1), other=st.floats(0, 1), source=st.sampled_from(["sampled", "rating"]))
def test_the_label_flips_when_the_scores_swap(one: float, other: float, source: str) -> None:
    ahead = build([candidate("left", one, source), candidate("right", other, source)]).pairs
    behind = build([candidate("left", other, source), candidate("right", one, source)]).pairs
    assert [(pair.chosen, pair.rejected) for pair in ahead] == [(pair.rejected, pair.chosen) for pair in behind]
    if ahead:
        assert ahead[0].chosen == ("left" if one > other else "right")


def test_best_sample_is_chosen_over_the_worst() -> None:
    pair = only([candidate("good", 0.9), candidate("fair", 0.5), candidate("poor", 0.1)])
    assert (pair.chosen, pair.rejected, pair.source) == ("good", "poor", "sampled>sampled")
    assert pair.margin == pytest.approx(0.8)


def test_the_models_own_right_answer_goes_before_the_reference() -> None:
    rows = [candidate("own right", 1.0), candidate("the reference", 1.0, "reference"), candidate("wrong", 0.2)]
    wide = OPEN.model_copy(update={"max_pairs_per_prompt": 3})
    assert only(rows, wide).chosen == "own right"


def test_the_reference_is_chosen_when_no_sample_is_right() -> None:
    pair = only([candidate("half", 0.5), candidate("truth", 1.0, "reference"), candidate("none", 0.1)])
    assert (pair.chosen, pair.rejected, pair.source) == ("truth", "none", "reference>sampled")


def test_the_reference_is_never_rejected() -> None:
    assert reasons([candidate("half", 0.5), candidate("truth", 0.1, "reference")]) == ["no answer to reject"]


def test_an_unfinished_answer_is_rejected_but_never_chosen() -> None:
    cut = candidate("cut of", 1.0, finished=False)
    assert only([candidate("whole", 0.9), cut | {"score": 0.0}]).rejected == "cut of"
    assert reasons([candidate("whole", 0.5), cut]) == ["chosen answer scored lower"]
    assert reasons([cut, cut | {"response": "cut as well"}]) == ["no finished answer to choose"]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([candidate("a", 0.5), candidate("b", 0.5)], "tie"),
        ([candidate("a", 0.5), candidate("b", 0.49)], "margin below min_margin"),
        ([candidate("a", 0.5)], "single answer"),
        ([candidate("same text", 0.9), candidate(" same  text ", 0.1)], "single answer"),
        ([candidate("long " * 30, 0.9), candidate("b", 0.1)], "chosen answer too long"),
    ],
)
def test_what_is_no_preference_gives_a_reason(rows: list[dict[str, Any]], reason: str) -> None:
    assert reasons(rows, OPEN.model_copy(update={"max_length_ratio": 2.0})) == [reason]


@pytest.mark.parametrize("score", [math.nan, math.inf, None])
def test_a_score_that_is_no_number_never_gives_a_pair(score: float | None) -> None:
    assert reasons([candidate("a", score), candidate("b", 0.1)]) == ["score is not a number", "single answer"]


def test_a_pair_that_fails_the_length_guard_gives_way_to_the_next_answer() -> None:
    strict = OPEN.model_copy(update={"max_length_ratio": 2.0})
    pair = only([candidate("a whole answer", 0.9), candidate("?", 0.0), candidate("a wrong one", 0.4)], strict)
    assert pair.rejected == "a wrong one"


def test_an_edit_is_chosen_over_its_original() -> None:
    pair = only([candidate("better", 1.0, "edit", rater="ann"), candidate("worse", 0.0, "original", rater="ann")])
    assert (pair.chosen, pair.source) == ("better", "edit>original")


def test_the_edit_of_one_person_is_not_compared_with_the_original_of_another() -> None:
    rows = [candidate("better", 1.0, "edit", rater="ann"), candidate("worse", 0.0, "original", rater="bob")]
    assert reasons(rows) == ["single answer", "single answer"]


def test_ratings_are_compared_on_the_raters_own_scale() -> None:
    rows = [
        candidate("a", 9.0, "rating", rater="mild"),
        candidate("b", 8.0, "rating", rater="mild"),
        candidate("c", 5.0, "rating", rater="harsh", prompt_id="q"),
        candidate("d", 1.0, "rating", rater="harsh", prompt_id="q"),
    ]
    assert [pair.margin for pair in build(rows).pairs] == [pytest.approx(2.0), pytest.approx(2.0)]


def test_a_rater_who_gives_one_score_only_says_nothing() -> None:
    rows = [candidate("a", 3.0, "rating"), candidate("b", 3.0, "rating")]
    assert reasons(rows) == ["rater gives one score only"] * 2


def test_people_who_contradict_each_other_give_no_pair() -> None:
    rows = [
        candidate("a", 5.0, "rating", rater="ann"),
        candidate("b", 1.0, "rating", rater="ann"),
        candidate("a", 1.0, "rating", rater="bob"),
        candidate("b", 5.0, "rating", rater="bob"),
    ]
    assert reasons(rows) == ["contradiction", "contradiction"]


def test_people_who_agree_give_one_pair() -> None:
    rows = [candidate(text, score, "rating", rater=rater) for rater in "xy" for text, score in (("a", 5.0), ("b", 1.0))]
    built = build(rows)
    assert len(built.pairs) == 1
    assert built.dropped == [("p", "repeat")]


def test_under_the_total_cap_longer_and_shorter_chosen_answers_are_balanced() -> None:
    rows = [
        candidate("x" * (9 if number % 4 else 3) + str(number % 2), score, prompt_id=f"{number:03}")
        for number in range(200)
        for score in (0.9,)
    ] + [candidate("y" * 6, 0.1, prompt_id=f"{number:03}") for number in range(200)]
    built = build(rows, OPEN.model_copy(update={"max_pairs": 40}))
    assert sum(len(pair.chosen) > len(pair.rejected) for pair in built.pairs) == 20
    assert [reason for _, reason in built.dropped] == ["over max_pairs"] * 160


def test_time_grows_with_the_candidates_not_with_their_square() -> None:
    def seconds(count: int) -> float:
        rows = [candidate(f"{number:05}", number / count) for number in range(count)]
        table = pa.Table.from_pylist(rows, schema=Candidate.SCHEMA)
        began = time.process_time()
        build_pairs(table, OPEN.model_copy(update={"min_margin": 5.0}))
        return time.process_time() - began

    small = min(seconds(1000) for _ in range(3))
    assert min(seconds(8000) for _ in range(3)) < 24 * small  # its square would be 64 times


def test_quality_figures() -> None:
    rows = [candidate("right", 1.0), candidate("bad", 0.25)]
    summary = summarise(build(rows))
    assert summary.metrics["chosen_longer_share"] == 1
    assert summary.details["sources"] == {"sampled>sampled": 1}
    assert histogram([0.05, 0.75, 1.0])["counts"] == [1, 0, 0, 0, 0, 0, 0, 1, 0, 1]
    assert histogram([2.5])["edges"][-1] == 3
    assert correlate([1.0, 2.0, 3.0], [3.0, 5.0, 7.0]) == pytest.approx(1)
    assert correlate([1.0, 1.0], [1.0, 2.0]) == 0


def _step(rows: list[dict[str, Any]], folder: Path, **settings: Any) -> tuple[Any, Any]:
    source = folder / "candidates"
    source.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=Candidate.SCHEMA), source / "candidates.parquet")
    seal(source, "candidates")
    pairs, summary = dsl.Dataset(uri=str(folder / "pairs")), dsl.Metrics(uri=str(folder / "summary"))
    build_preferences.python_func(
        settings=settings, candidates=dsl.Dataset(uri=str(source)), pairs=pairs, summary=summary
    )
    return pairs, summary


def test_step_writes_pairs_and_a_reason_for_every_drop(tmp_path: Path) -> None:
    rows = [
        candidate(text, score, prompt_id=f"{number:02}")
        for number in range(20)
        for text, score in (("good", 1.0), ("poor", 0.1))
    ]
    rows.append(candidate("alone", 1.0, prompt_id="99"))
    pairs, summary = _step(rows, tmp_path, min_pairs=16.0)
    assert read_manifest(pairs.path, "pairs").counts == {"pairs": 20, "dropped": 1}
    assert len(read_rows(tmp_path / "pairs" / "pairs.parquet", PreferencePair)) == 20
    dropped = pq.read_table(tmp_path / "pairs" / "dropped.parquet").to_pylist()
    assert dropped == [{"prompt_id": "99", "reason": "single answer"}]
    details = read_summary(summary.path).details
    assert details["pairs"] == 20
    assert details["dropped"] == {"single answer": 1}


def test_too_few_pairs_stop_the_step_and_say_what_to_change(tmp_path: Path) -> None:
    rows = [candidate(text, 1.0) for text in ("a", "b")]
    with pytest.raises(DataError, match=r"0 pairs; 16 are needed.*'tie': 1(.|\n)*raise preference.temperature"):
        _step(rows, tmp_path)
