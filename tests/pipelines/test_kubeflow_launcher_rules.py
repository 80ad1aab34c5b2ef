"""The definition for the cluster, executed by the rules of KFP's launcher, gives what the local engine gives."""

import json
import os
import sys
from pathlib import Path

import pytest
from kfp import dsl

FIXTURES = str(Path(__file__).parents[1] / "fixtures")
sys.path.insert(0, FIXTURES)
import steps
from bench import Bench
from kfp_launcher import launch

from assay.components.runtime import work
from assay.pipelines.engines.kubeflow import compile as compilation
from assay.pipelines.engines.kubeflow.profile import Profile
from assay.pipelines.engines.local import store
from assay.pipelines.engines.local.artifacts import content_digest

POD = {"PYTHONPATH": os.pathsep.join([FIXTURES, os.environ.get("PYTHONPATH", "")])}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("JOURNAL", "")
    monkeypatch.setenv("PYTHONPATH", "")
    return Bench(tmp_path)


@pytest.fixture
def profile(tmp_path):
    volume = {"claim": "home", "path": str(tmp_path / "volume")}
    return Profile.model_validate({"volume": volume, "default": {"env": {"FROM_PROFILE": "yes"}}})


@dsl.pipeline(name="small")
def small(n: int = 3, text: str = "a 'quoted' \"word\"") -> str:
    """Every way in which values and artifacts travel in the shipped graph: constants, outputs, branches, OneOf."""
    written = steps.write(text=f"<{text}>")
    doubled = steps.double(n=n, suffix="!")
    settled = steps.settle(settings={"a": {"b": [1, 2.5, True]}}, prompt="{{not a placeholder}}")
    steps.weigh(model=doubled.outputs["out"]).after(settled)
    steps.optional(data=written.outputs["out"])
    steps.facts()
    with dsl.If(doubled.outputs["Output"] > 5, name="big"):
        big = steps.echo(text="big")
    with dsl.Else(name="little"):
        little = steps.echo(text="little")
    chosen = dsl.OneOf(big.output, little.output)
    steps.read(data=written.outputs["out"])
    return steps.echo(text=chosen).output


def compared(bench, launched, record) -> list[str]:
    """Hold every task's outputs of one engine against the other's; return the paths of the tasks that ran."""
    ran = []
    for path, left in launched.done.items():
        folder = store.task_folder(bench.home, record.id, path)
        if not (folder / "executor_output.json").exists():
            continue
        ours = json.loads((folder / "executor_output.json").read_text())
        assert left.parameters == ours["parameterValues"], path
        for name, artifact in left.artifacts.items():
            there = ours["artifacts"][name]["artifacts"][0]
            assert artifact["metadata"] == there["metadata"], path
            digests = {content_digest(Path(entry["uri"]), bench.home) for entry in (artifact, there)}
            assert len(digests) == 1, path
        ran.append(path)
    return ran


@pytest.mark.parametrize(("n", "branch"), [(3, "condition-2/echo"), (2, "condition-3/echo-2")])
def test_the_same_outputs_on_both_branches(bench, profile, tmp_path, n, branch):
    path = bench.compile(small)
    compilation.place(path, profile)
    record = bench.run(path, parameters={"n": n}, use_cache=False)  # two of its steps are the same
    ran_here = bench.ran()
    bench.journal.unlink()
    launched = launch(path, tmp_path / "cluster", POD, n=n)
    assert launched.outputs.parameters == record.outputs == {"Output": "big" if n == 3 else "little"}
    assert bench.ran() == ran_here
    ran = compared(bench, launched, record)
    assert f"condition-branches-1/{branch}" in ran
    assert len(ran) == 9
    finished = {name for name, task in record.tasks.items() if task.state == "SUCCEEDED" and "echo" in name}
    assert finished == {name for name in ran if "echo" in name}


def test_a_step_on_a_cluster_keeps_its_checkpoints_until_it_succeeds(bench, profile, tmp_path):
    @dsl.pipeline(name="training")
    def training(steps_: int = 40) -> int:
        return steps.train(steps=steps_).outputs["Output"]

    path = bench.compile(training)
    compilation.place(path, profile)
    volume = tmp_path / "volume" / "work"
    first = launch(path, tmp_path / "cluster", POD)
    (note,) = bench.lines("train")
    assert note["start"] == 0
    inputs = {"inputs": {"parameterValues": {"steps": 40}, "artifacts": {}}}
    (executor,) = first.pipeline.deployment_spec.executors.values()
    digest = executor.container.args[3]
    folder = volume / work.work_key("steps:train", digest, inputs)
    assert not folder.exists()
    folder.mkdir()
    (folder / "step").write_text("30")  # what a pod that was evicted left behind
    launch(path, tmp_path / "again", POD)
    assert bench.lines("train")[-1]["start"] == 30
    assert not folder.exists()


def test_an_output_that_is_not_written_fails_the_task(bench, profile, tmp_path):
    @dsl.pipeline(name="nothing")
    def nothing() -> int:
        return steps.fail(how="nothing").output

    path = bench.compile(nothing)
    compilation.place(path, profile)
    with pytest.raises((FileNotFoundError, RuntimeError)):
        launch(path, tmp_path / "cluster", POD)
    assert bench.run(path).state == "FAILED"
