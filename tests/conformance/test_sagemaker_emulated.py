# ruff: noqa: B006  kfp reads a pipeline's defaults
"""The same compiled graphs under the local engine, and translated and emulated as SageMaker would run them.

Every step that ran in one ran in the other, with the same parameters and the same bytes.
"""

import os
import sys
from pathlib import Path

import pytest
from kfp import dsl

FIXTURES = Path(__file__).parents[1] / "fixtures"
sys.path.insert(0, str(FIXTURES))
import aws
import equality
import steps
from bench import Bench
from clouds import compiled, deploy

from assay.pipelines.engines.sagemaker.emulate import Emulator
from assay.pipelines.engines.sagemaker.emulation.aws import client, provide
from assay.pipelines.engines.sagemaker.translate import translate
from assay.pipelines.engines.sagemaker.validate import check


@pytest.fixture(scope="module")
def server():
    with aws.server() as environment:
        yield environment


@pytest.fixture
def engines(tmp_path, monkeypatch, server):
    """Run a pipeline on both; return the local record, the emulated one, and what each left."""
    python_path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("JOURNAL", "")
    monkeypatch.setenv("PYTHONPATH", "")
    bench = Bench(tmp_path)

    def run(pipeline, **settings):
        record = bench.run(pipeline)
        translation = translate(compiled(pipeline, tmp_path), deploy(**settings))
        assert check(translation.definition) == []
        for digest, text in translation.templates.items():
            path = tmp_path / "tasks" / digest / "task.json"
            path.parent.mkdir(parents=True)
            path.write_bytes(text)
        provide(translation.definition, tmp_path / "tasks", server)
        paths = os.pathsep.join(filter(None, [str(FIXTURES), python_path]))
        inside = {"JOURNAL": str(tmp_path / "emulated"), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        emulator = Emulator(tmp_path / "emulator", server, environment=inside, containers=False)
        execution = emulator.run(translation.definition, translation.name)
        storage = client("s3", server)
        here = equality.left_here(bench.home, record)
        return record, execution, here, equality.left_there(storage, execution, tmp_path / "left")

    return run


def test_values_files_branches_and_what_comes_after_them(engines):
    @dsl.pipeline(name="branches")
    def pipeline(text: str = "a b", limit: int = 3):
        written = steps.write(text=text)
        steps.read(data=written.outputs["out"])
        with dsl.If(written.outputs["Output"] > limit, name="long"):
            long = steps.double(n=written.outputs["Output"])
        with dsl.Else(name="short"):
            short = steps.double(n=1, suffix="!")
        steps.weigh(model=dsl.OneOf(long.outputs["out"], short.outputs["out"]))

    record, execution, here, there = engines(pipeline)
    assert record.state == "SUCCEEDED", record.message
    assert execution.state == "Succeeded", execution.reason
    assert here["weigh"]["params"] == {"Output": "2!"}
    plain = {name: left for name, left in there.items() if not name.startswith("weigh")}
    assert plain == {name: left for name, left in here.items() if not name.startswith("weigh")}
    (copy,) = [left for name, left in there.items() if name.startswith("weigh")]  # one per branch, and one ran
    assert copy == here["weigh"]


def test_a_training_hands_on_its_folder(engines):
    @dsl.pipeline(name="teaching")
    def pipeline():
        taught = steps.teach(n=4)
        steps.weigh(model=taught.outputs["model"])
        steps.read(data=taught.outputs["notes"])

    record, execution, here, there = engines(pipeline, tasks={"teach": {"kind": "training"}})
    assert record.state == "SUCCEEDED", record.message
    assert execution.state == "Succeeded", execution.reason
    assert execution.steps["teach"].kind == "Training"
    assert there == here
    assert there["weigh"]["params"] == {"Output": "wwww"}


def test_a_loop_over_a_list_that_is_known(engines):
    @dsl.pipeline(name="loop")
    def pipeline():
        with dsl.ParallelFor([1, 2]) as n:
            doubled = steps.double(n=n)
        steps.many(numbers=dsl.Collected(doubled.outputs["Output"]))

    record, execution, here, there = engines(pipeline)
    assert record.state == "SUCCEEDED", record.message
    assert execution.state == "Succeeded", execution.reason
    assert there["many"] == here["many"] == {"params": {"Output": 6}}
    assert len(there) == 3
    assert there == here


def test_a_condition_that_negates_is_written_as_the_service_reads_it(engines):
    @dsl.pipeline(name="unequal")
    def pipeline():
        measured = steps.facts()
        with dsl.If(measured.outputs["n"] != 4, name="yes"):
            steps.echo(text="yes")
        with dsl.If(measured.outputs["n"] != 3, name="no"):
            steps.double(n=1)

    record, execution, here, there = engines(pipeline)
    assert record.state == "SUCCEEDED", record.message
    assert execution.state == "Succeeded", execution.reason
    assert len(there) == 2
    assert {name: left for name, left in there.items() if name != "facts"} == {
        name: left for name, left in here.items() if name != "facts"
    }
