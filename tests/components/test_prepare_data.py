import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kfp import dsl

from assay.components.contracts.artifacts import digest_of, read_manifest, seal
from assay.components.contracts.errors import DataError
from assay.components.contracts.recipe import DataSettings
from assay.components.contracts.rows import Example, Message, read_rows, write_rows
from assay.components.prepare_data.component import prepare_data
from assay.components.prepare_data.prepare import CONFLICT, DUPLICATE, SPLITS, check_leaks, prepare, row_keys, split_of
from assay.components.shared.summary import read_summary
from assay.components.shared.tasks.task import get_task

RELAXED = DataSettings(min_test_rows=1)


def example(question: str, answer: str, group: str = "", source: str = "") -> Example:
    prompt = [Message(role="user", content=question)]
    key = digest_of([[turn.model_dump() for turn in prompt], answer])[:32]
    return Example(id=key, group=group or question, prompt=prompt, reference=answer, source=source)


def table(examples: list[Example]) -> pa.Table:
    return pa.Table.from_pylist([row.model_dump() for row in examples], schema=Example.SCHEMA)


def many(count: int) -> list[Example]:
    return [example(f"question {number}", f"answer {number}", f"group {number // 2}") for number in range(count)]


def sides(examples: list[Example], chosen: DataSettings = RELAXED) -> dict[str, str]:
    splits = prepare(table(examples), chosen).splits
    return {row["id"]: name for name in SPLITS for row in splits[name].to_pylist()}


rows = st.lists(
    st.builds(
        example,
        question=st.sampled_from([f"q{number}" for number in range(30)]),
        answer=st.sampled_from(["a", "b"]),
        source=st.sampled_from(["x:1", "x:2"]),
    ),
    max_size=60,
)


@settings(max_examples=50, deadline=None)
@given(extra=rows, order=st.randoms(use_true_random=False))
def test_splits_do_not_depend_on_the_order_of_the_rows(extra: list[Example], order: Any) -> None:
    examples = many(200) + extra
    shuffled = order.sample(examples, len(examples))
    one, other = prepare(table(examples), RELAXED), prepare(table(shuffled), RELAXED)
    assert one.splits == other.splits
    assert one.dropped == other.dropped


@settings(max_examples=50, deadline=None)
@given(extra=rows)
def test_every_row_is_kept_once_or_dropped_with_a_reason(extra: list[Example]) -> None:
    examples = many(200) + extra
    prepared = prepare(table(examples), RELAXED)
    kept = [row["id"] for part in prepared.splits.values() for row in part.to_pylist()]
    assert len(kept) == len(set(kept))
    assert sorted(kept + [row["id"] for row in prepared.dropped]) == sorted(row.id for row in examples)
    assert {row["reason"] for row in prepared.dropped} <= {CONFLICT, DUPLICATE}


@settings(max_examples=20, deadline=None)
@given(extra=st.integers(1, 300))
def test_no_group_changes_side_when_the_data_grows(extra: int) -> None:
    before, after = sides(many(200)), sides(many(200 + extra))
    assert before.items() <= after.items()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.05, 1), min_size=5, max_size=5))
def test_shares_are_met_in_the_long_run(weights: list[float]) -> None:
    shares = {name: weight / sum(weights) for name, weight in zip(SPLITS, weights, strict=True)}
    chosen = DataSettings(shares=shares)
    found = [split_of(f"group {number}", chosen) for number in range(4000)]
    for name, share in shares.items():
        assert found.count(name) / 4000 == pytest.approx(share, abs=0.04)


def test_no_group_stands_on_two_sides() -> None:
    examples = many(400)
    found = sides(examples)
    by_group: dict[str, set[str]] = {}
    for row in examples:
        by_group.setdefault(row.group, set()).add(found[row.id])
    assert all(len(names) == 1 for names in by_group.values())


def test_two_spellings_of_a_direction_stand_on_the_same_side() -> None:
    task = get_task("medication_directions")
    answer = '{"dose":2,"unit":"tablet","route":"oral","per_day":4,"daily":8,"flag":"ok"}'
    texts = ["Take 2 tabs PO q6h", "take two tablets by mouth every 6 hours"]
    same = [example(text, answer, task.group(task.prompt(text))) for text in texts]
    found = sides(many(200) + same)
    assert found[same[0].id] == found[same[1].id]


def test_of_equal_rows_one_stays() -> None:
    copies = [example("twice", "same", source=f"rows.jsonl:{line}") for line in (3, 1, 2)]
    prepared = prepare(table(many(200) + copies), RELAXED)
    assert [(row["source"], row["reason"]) for row in prepared.dropped] == [
        ("rows.jsonl:2", DUPLICATE),
        ("rows.jsonl:3", DUPLICATE),
    ]


def test_of_conflicting_references_none_stays() -> None:
    rivals = [example("which?", "this"), example("which?", "that"), example("which?", "that")]
    prepared = prepare(table(many(200) + rivals), RELAXED)
    assert prepared.count(CONFLICT) == 3
    assert not {row.id for row in rivals} & sides(many(200) + rivals).keys()


def test_a_prompt_in_two_groups_is_refused() -> None:
    keys = row_keys(table([example("q", "a", "one"), example("q", "a", "two")]))
    import polars as pl

    with pytest.raises(DataError, match="same prompt"):
        check_leaks(keys.with_columns(split=pl.Series(["sft", "test"])))


def test_too_few_held_out_rows_stop_the_run() -> None:
    with pytest.raises(DataError, match=r"1000 are needed[^→]+→ give about \d+ rows"):
        prepare(table(many(200)), DataSettings(min_test_rows=1000))


def test_an_empty_split_that_is_needed_stops_the_run() -> None:
    with pytest.raises(DataError, match="split '.*' is empty"):
        prepare(table(many(4)), RELAXED)


def test_a_split_without_a_share_may_be_empty() -> None:
    shares: Any = {"sft": 0.5, "validation": 0.2, "test": 0.3}
    prepared = prepare(table(many(100)), DataSettings(shares=shares, min_test_rows=1))
    assert prepared.splits["rl"].num_rows == 0


def test_a_split_that_is_always_needed_must_have_a_share() -> None:
    shares: Any = {"sft": 0.5, "rl": 0.2, "test": 0.3}
    with pytest.raises(DataError, match="'validation' is empty"):
        prepare(table(many(100)), DataSettings(shares=shares, min_test_rows=1))


def test_step_writes_sealed_splits_and_says_what_it_dropped(tmp_path: Path) -> None:
    examples = [*many(300), example("question 0", "answer 0", "group 0"), example("w", "1"), example("w", "2")]
    accepted = tmp_path / "accepted"
    write_rows(accepted / "rows.parquet", examples, Example)
    seal(accepted, "rows")
    digests = []
    for name in ("one", "two"):
        data, summary = dsl.Dataset(uri=str(tmp_path / name)), dsl.Metrics(uri=str(tmp_path / f"{name}-summary"))
        prepare_data.python_func(
            settings={"min_test_rows": 50.0, "rows": 300.0},
            accepted=dsl.Dataset(uri=str(accepted)),
            data=data,
            summary=summary,
        )
        digests.append((read_manifest(data.path, "splits").digest, read_manifest(summary.path, "summary").digest))
    assert digests[0] == digests[1]
    told = read_summary(summary.path)
    assert told.details["duplicates_dropped"] == 1
    assert told.details["conflicts"] == 2
    assert "checked" in told.headline
    test = read_rows(tmp_path / "one" / "test.parquet", Example)
    assert [row.id for row in test] == sorted(row.id for row in test)
    assert told.details["splits"]["test"]["rows"] == len(test)  # type: ignore[index]
    dropped = [json.loads(line) for line in (tmp_path / "one" / "dropped.jsonl").read_text().splitlines()]
    assert sorted(row["reason"] for row in dropped) == [CONFLICT, CONFLICT, DUPLICATE]
