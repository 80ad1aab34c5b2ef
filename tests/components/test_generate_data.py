import json
from pathlib import Path

import pytest
from kfp import dsl

from assay.components.contracts.artifacts import Manifest, read_manifest
from assay.components.contracts.errors import RecipeError
from assay.components.generate_data.component import generate_data


def generate(folder: Path, task: str = "medication_directions", rows: float = 50, seed: float = 0) -> Manifest:
    raw = dsl.Dataset(uri=str(folder))
    generate_data.python_func(task=task, rows=rows, seed=seed, raw=raw)
    return read_manifest(raw.path, "raw")


def test_rows_are_conversations_that_end_with_the_answer(tmp_path: Path) -> None:
    manifest = generate(tmp_path / "raw", rows=50.0)
    lines = (tmp_path / "raw" / "rows.jsonl").read_text().splitlines()
    assert len(lines) == manifest.counts["rows"] == 50
    for line in lines:
        assert [turn["role"] for turn in json.loads(line)["messages"]] == ["system", "user", "assistant"]


def test_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    one, again, other = (generate(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert one.digest == again.digest
    assert one.content != other.content


def test_more_rows_keep_the_first_ones(tmp_path: Path) -> None:
    generate(tmp_path / "few", rows=10)
    generate(tmp_path / "many", rows=30)
    few, many = ((tmp_path / name / "rows.jsonl").read_text() for name in ("few", "many"))
    assert many.startswith(few)


def test_progress_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_PROGRESS", str(tmp_path / "progress"))
    monkeypatch.setattr("assay.components.generate_data.generate.REPORT_EVERY", 10)
    generate(tmp_path / "raw", rows=30)
    assert [json.loads(line)["done"] for line in (tmp_path / "progress").read_text().splitlines()] == [10, 20, 30]


@pytest.mark.parametrize("task", ["exact_match", "poetry"])
def test_a_task_without_a_generator_is_refused(tmp_path: Path, task: str) -> None:
    with pytest.raises(RecipeError):
        generate(tmp_path / "raw", task=task)
