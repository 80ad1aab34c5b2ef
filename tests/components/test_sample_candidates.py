"""Candidates: scored, repeatable, and the same after a kill."""

from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from assay.components.contracts.artifacts import read_manifest, seal
from assay.components.contracts.errors import DataError
from assay.components.contracts.recipe import PairSettings
from assay.components.contracts.rows import Candidate, Example, Message, read_rows, write_rows
from assay.components.sample_candidates import sample
from assay.components.sample_candidates.component import sample_candidates
from assay.components.shared.generate import Generator
from assay.components.shared.models import load_model
from assay.components.shared.summary import read_summary
from assay.components.shared.tasks.task import get_task

TASK = get_task("medication_directions")
SETTINGS = PairSettings(prompts=5, samples=3, max_new_tokens=6)


def examples(count: int) -> list[Example]:
    rows = [[Message(**turn) for turn in row["messages"]] for row in TASK.generate(count, seed=0)]
    return [
        Example(id=f"{place:032x}", group=str(place), prompt=turns[:-1], reference=turns[-1].content)
        for place, turns in enumerate(rows)
    ]


@pytest.fixture
def generator(tiny_model: Path, tiny_tokenizer: Any) -> Generator:
    return Generator(load_model(tiny_model), tiny_tokenizer)


def test_every_prompt_gets_its_samples_and_the_reference(generator: Generator, tmp_path: Path) -> None:
    rows = sample.sample_candidates(generator, TASK, examples(8), SETTINGS, 0, tmp_path)
    assert len(rows) == 5 * (3 + 1)
    for example, place in zip(examples(5), range(0, 20, 4), strict=True):
        *sampled, reference = rows[place : place + 4]
        assert {row.prompt_id for row in [*sampled, reference]} == {example.id}
        assert [row.source for row in sampled] == ["sampled"] * 3
        assert reference.source == "reference"
        assert reference.score == 1
        assert all(row.score == TASK.reward(row.response, example.reference, row.finished) for row in sampled)
        assert not any(row.finished for row in sampled)  # a random model does not end by itself


def test_the_reference_may_be_left_out(generator: Generator, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"include_reference": False})
    rows = sample.sample_candidates(generator, TASK, examples(2), settings, 0, tmp_path)
    assert [row.source for row in rows] == ["sampled"] * 6


def test_the_seed_decides(generator: Generator, tmp_path: Path) -> None:
    first, again, other = (
        sample.sample_candidates(generator, TASK, examples(5), SETTINGS, seed, tmp_path / str(place))
        for place, seed in enumerate((1, 1, 2))
    )
    assert first == again
    assert first != other


def test_a_killed_sampling_goes_on_and_gives_the_same(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "BATCH", 3)  # one prompt per batch
    whole = sample.sample_candidates(generator, TASK, examples(5), SETTINGS, 0, tmp_path / "whole")
    run, calls = generator.run, 0

    def dying(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return run(*arguments, **named)

    monkeypatch.setattr(generator, "run", dying)
    with pytest.raises(KeyboardInterrupt):
        sample.sample_candidates(generator, TASK, examples(5), SETTINGS, 0, tmp_path / "killed")
    assert sample.sample_candidates(generator, TASK, examples(5), SETTINGS, 0, tmp_path / "killed") == whole
    assert calls == 3 + 3


def test_other_settings_take_nothing_from_disk(generator: Generator, tmp_path: Path) -> None:
    cold = sample.sample_candidates(generator, TASK, examples(2), SETTINGS, 0, tmp_path)
    warmer = SETTINGS.model_copy(update={"temperature": 3.0})
    assert sample.sample_candidates(generator, TASK, examples(2), warmer, 0, tmp_path) != cold


def test_an_empty_split_is_the_inputs_fault(generator: Generator, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the preference split is empty"):
        sample.sample_candidates(generator, TASK, [], SETTINGS, 0, tmp_path)


def test_the_wire_writes_sealed_rows_and_a_summary(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "data" / "preference.parquet", examples(4), Example)
    seal(tmp_path / "data", "splits")
    digests = []
    for name in ("first", "second"):
        monkeypatch.setenv("ASSAY_WORK", str(tmp_path / name / "work"))
        sample_candidates.python_func(
            settings=SETTINGS.model_dump(mode="json"),
            task="medication_directions",
            seed=0,
            model=dsl.Model(uri=str(tiny_model)),
            data=dsl.Dataset(uri=str(tmp_path / "data")),
            candidates=dsl.Dataset(uri=str(tmp_path / name / "candidates")),
            summary=dsl.Metrics(uri=str(tmp_path / name / "summary")),
        )
        digests.append([read_manifest(tmp_path / name / part).digest for part in ("candidates", "summary")])
    assert digests[0] == digests[1]
    assert len(read_rows(tmp_path / "first" / "candidates" / "candidates.parquet", Candidate)) == 16
    summary = read_summary(tmp_path / "first" / "summary")
    assert summary.details == {"prompts": 4, "candidates": 16, "right_share": 0.0}
