"""The cache is keyed by content: what a step depends on, and nothing else."""

import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from kfp import dsl

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
import steps
from bench import Bench, states

from assay.components.contracts.errors import RunError
from assay.pipelines.engines.local.artifacts import content_digest


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("JOURNAL", "")
    monkeypatch.setenv("PYTHONPATH", "")
    return Bench(tmp_path)


@dsl.pipeline(name="chain")
def chain(uri: str):
    rows = dsl.importer(artifact_uri=uri, artifact_class=dsl.Dataset)
    text = steps.read(data=rows.output)
    written = steps.write(text=text.output)
    steps.read(data=written.outputs["out"])


def entry(bench, record, task):
    return bench.home / "cache" / "steps" / record.tasks[task].key


def test_content_decides_not_the_file(bench, tmp_path):
    rows, path = tmp_path / "rows.txt", bench.compile(chain)
    rows.write_text("one two")
    first = bench.run(path, parameters={"uri": str(rows)})
    assert bench.ran() == {"read": 2, "write": 1}
    os.utime(rows, (1, 1))
    copy = tmp_path / "elsewhere" / "copy.txt"
    copy.parent.mkdir()
    shutil.copy(rows, copy)
    for uri in (rows, copy):
        record = bench.run(path, parameters={"uri": str(uri)})
        assert bench.ran() == {}
        assert states(record) == {"importer": "SUCCEEDED", "read": "CACHED", "write": "CACHED", "read-2": "CACHED"}
        assert bench.output(record, "read-2") == "one two"
        assert bench.artifact(record, "write", "out").read_text() == "one two"
    rows.write_text("ONE two")
    record = bench.run(path, parameters={"uri": str(rows)})
    assert bench.ran() == {"read": 2, "write": 1}
    assert bench.output(record, "read-2") == "ONE two"
    assert bench.artifact(first, "write", "out").read_text() == "one two"


def test_a_folder_is_its_files(bench, tmp_path):
    folder, path = tmp_path / "rows", bench.compile(chain)
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "timing.json").write_text("1")
    bench.run(path, parameters={"uri": str(folder)})
    (folder / "timing.json").write_text("2")  # a timing is not content
    bench.run(path, parameters={"uri": str(folder)})
    assert bench.ran() == {}
    (folder / "b.txt").write_text("b")
    bench.run(path, parameters={"uri": str(folder)})
    assert bench.ran() == {"read": 2, "write": 1}


def truncate(folder):
    (folder / "outputs" / "out").unlink()
    (folder / "outputs" / "out").write_text("one")


def lose(folder):
    (folder / "outputs" / "out").unlink()


def add(folder):
    (folder / "outputs" / "more").write_text("x")


def garble(folder):
    (folder / "entry.json").write_text("{")


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def test_a_damaged_entry_is_dropped_and_the_step_runs_again(bench, tmp_path):
    rows, path = tmp_path / "rows.txt", bench.compile(chain)
    rows.write_text("one two")
    record = bench.run(path, parameters={"uri": str(rows)})
    for damage in (truncate, lose, add, garble, empty):
        damage(entry(bench, record, "write"))
        record = bench.run(path, parameters={"uri": str(rows)})
        assert bench.ran() == {"write": 1}, damage
        assert states(record)["read-2"] == "CACHED"
        assert any("damaged" in event.message for event in bench.events if event.kind == "log")
    bench.run(path, parameters={"uri": str(rows)})
    assert bench.ran() == {}


def test_from_step_runs_it_and_all_after_it_anew(bench):
    @dsl.pipeline(name="inner")
    def inner(n: int) -> int:
        return steps.twice(n=n).outputs["out"]

    @dsl.pipeline(name="anew")
    def pipeline():
        first = steps.twice(n=1)
        second = steps.twice(n=first.outputs["out"]).set_display_name("The second")
        third = inner(n=second.outputs["out"])
        steps.twice(n=third.output)
        steps.echo(text="beside")

    path = bench.compile(pipeline)
    bench.run(path)
    for name in ("twice-2", "twice_2", "The second"):
        record = bench.run(path, from_step=name)
        assert [line["n"] for line in bench.lines()] == [2, 4, 8]
        assert states(record)["twice"] == states(record)["echo"] == "CACHED"
    bench.run(path, from_step="inner/twice")
    assert [line["n"] for line in bench.lines()] == [4, 8]
    bench.run(path)
    assert bench.ran() == {}
    with pytest.raises(RunError, match="choose one of: echo, twice, twice-2, twice, twice-3"):
        bench.run(path, from_step="nowhere")


def test_caching_off_runs_always_and_does_not_spoil_what_follows(bench):
    @dsl.pipeline(name="off")
    def pipeline():
        trained = steps.train(steps=2).set_caching_options(False)
        steps.weigh(model=trained.outputs["model"])

    path = bench.compile(pipeline)
    first = bench.run(path)
    record = bench.run(path)
    assert bench.ran() == {"train": 1}
    assert states(record) == {"train": "SUCCEEDED", "weigh": "CACHED"}
    assert bench.artifact(first, "train", "model/timing.json").read_text() != (
        bench.artifact(record, "train", "model/timing.json").read_text()
    )
    bench.run(path, use_cache=False)
    assert bench.ran() == {"train": 1, "weigh": 1}


def test_equal_steps_at_once_run_once(bench):
    @dsl.pipeline(name="equal")
    def pipeline():
        with dsl.ParallelFor([1, 1, 1]) as n:
            steps.double(n=n)

    record = bench.run(pipeline)
    assert bench.ran() == {"double": 1}
    assert sorted(task.state for path, task in record.tasks.items() if path.endswith("double")) == [
        "CACHED",
        "CACHED",
        "SUCCEEDED",
    ]


def test_a_key_of_the_authors_never_joins_different_inputs(bench):
    @dsl.pipeline(name="key")
    def pipeline():
        with dsl.ParallelFor([1, 2]) as n:
            one = steps.double(n=n).set_caching_options(True, cache_key="mine")
        steps.collect(models=dsl.Collected(one.outputs["out"]), numbers=dsl.Collected(one.outputs["Output"]))

    path = bench.compile(pipeline)
    first = bench.run(path)
    second = bench.run(path)
    assert bench.ran() == {}
    assert bench.output(first, "collect") == bench.output(second, "collect") == '[["2", "4"], [2, 4]]'


def test_code_environment_and_image_are_part_of_the_key(bench):
    @dsl.pipeline(name="parts")
    def pipeline():
        steps.echo(text="x").set_env_variable("LEVEL", "1")

    path = bench.compile(pipeline)
    bench.run(path)
    text = path.read_text()
    digest = text.split("--code_digest\n")[1].split()[1]
    for old, new in [(digest, "a" * 64), ("value: '1'", "value: '2'"), ("assay-data-python", "assay-data-python:2")]:
        path.write_text(text.replace(old, new))
        bench.run(path)
        assert bench.ran() == {"echo": 1}, old
    path.write_text(text)
    bench.run(path)
    assert bench.ran() == {}


def test_a_cached_run_is_quick(bench):
    @dsl.pipeline(name="quick")
    def pipeline():
        number = 1
        for _ in range(20):
            number = steps.twice(n=number).outputs["out"]

    path = bench.compile(pipeline)
    bench.run(path)
    assert bench.ran() == {"twice": 20}
    before = time.process_time()
    record = bench.run(path)
    assert time.process_time() - before < 1.0
    assert bench.ran() == {}
    assert bench.output(record, "twice-20", "out") == 2**20


def test_large_files_are_hashed_once(tmp_path):
    file, other = tmp_path / "model.bin", tmp_path / "copy.bin"
    file.write_bytes(b"m" * 3_000_000)
    os.utime(file, (1, 1))
    digest = content_digest(file, tmp_path)
    assert (tmp_path / "cache" / "digests.sqlite").exists()
    assert content_digest(file, tmp_path) == digest
    shutil.copy(file, other)
    assert content_digest(other, tmp_path) == digest
    file.write_bytes(b"n" * 3_000_000)  # young: read again, whatever its time says
    assert content_digest(file, tmp_path) != digest
