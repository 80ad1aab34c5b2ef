"""The same trigger twice is one run: from many processes, after a kill, on a folder and on S3."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import pytest
from kfp import dsl

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
import steps
from bench import FIXTURES, Bench

from assay.components.contracts.errors import RecipeError, RunError
from assay.components.contracts.recipe import Recipe
from assay.components.shared.storage import open_storage
from assay.pipelines.engines.local import store
from assay.pipelines.engines.outcome import Outcome
from assay.pipelines.triggers import launch, once
from assay.pipelines.triggers.launch import Job
from assay.pipelines.triggers.once import Claim, Record, Trigger
from fixtures.shelf import Shelf

RECIPE = Recipe(name="lamps")
DONE = Outcome(engine="kubeflow", run="run-1", state="SUBMITTED")
ENDED = Outcome(engine="kubeflow", run="run-1", state="SUCCEEDED", decision="hold")


def trigger(what: str = "commit 1", **job: object) -> Trigger:
    return Trigger.of("ci", what, Job(RECIPE, **job))


def claims(shelf: Shelf) -> list[str]:
    return [key.rpartition("/")[2] for key in shelf.keys("triggers/")]


def test_the_second_time_nothing_is_launched(shelf: Shelf) -> None:
    launched = []

    def start() -> Outcome:
        launched.append(1)
        return DONE

    first, now = once.once(trigger(), start, wait=False)
    again, then = once.once(trigger(), start, wait=False)
    assert (now, then, len(launched)) == (True, False, 1)
    assert again == first
    assert again.outcome == DONE
    assert claims(shelf) == ["0001.claim.json", "0001.end.json"]
    assert [record.state for record in once.records()] == ["SUBMITTED"]


def test_who_waits_follows_a_run_that_was_only_submitted(shelf: Shelf) -> None:
    once.once(trigger(), lambda: DONE, wait=False)
    record, now = once.once(trigger(), lambda: ENDED)  # the engine joins the run by its trigger
    assert (now, record.outcome) == (True, ENDED)
    assert once.once(trigger(), lambda: DONE) == (record, False)


def test_of_many_at_once_one_launches_and_the_others_are_told(shelf: Shelf) -> None:
    launched = []

    def start() -> Outcome:
        launched.append(1)
        time.sleep(0.5)
        return DONE

    def fire(number: int) -> str:
        try:
            return str(once.once(trigger(), start, wait=False)[1])
        except RunError as error:
            return error.what

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(fire, range(8)))
    assert len(launched) == 1
    assert said.count("True") == 1
    assert set(said) <= {"True", "False", "this trigger's run is under way"}


@pytest.mark.parametrize(
    "other",
    [
        Trigger.of("ci", "commit 2", Job(RECIPE)),
        Trigger.of("data", "commit 1", Job(RECIPE)),
        Trigger.of("ci", "commit 1", Job(RECIPE, "sagemaker")),
        Trigger.of("ci", "commit 1", Job(RECIPE, data="s3://rows/new")),
        Trigger.of("ci", "commit 1", Job(RECIPE.model_copy(update={"seed": 7}))),
        Trigger.of("ci", "commit 1", Job(RECIPE, deploy=Path(__file__))),
    ],
)
def test_what_may_change_a_run_makes_another_trigger(other: Trigger) -> None:
    assert other.id != trigger().id
    assert trigger().id == trigger(wait=False).id


def test_a_launch_that_was_refused_is_tried_again(shelf: Shelf) -> None:
    def refuse() -> Outcome:
        raise RunError("no cluster answers", fix="start it")

    with pytest.raises(RunError, match="no cluster"):
        once.once(trigger(), refuse)
    (record,) = once.records()
    assert (record.state, record.end.error.splitlines()[0]) == ("ERROR", "no cluster answers")
    assert once.once(trigger(), lambda: DONE)[1]
    assert claims(shelf) == ["0001.claim.json", "0001.end.json", "0002.claim.json", "0002.end.json"]


def test_a_watcher_pauses_after_a_refusal_and_a_person_does_not(shelf: Shelf) -> None:
    def refuse() -> Outcome:
        raise RunError("no cluster answers")

    with pytest.raises(RunError, match="no cluster"):
        once.once(trigger(), refuse, pause=timedelta(minutes=5))
    with pytest.raises(once.Busy, match="the last launch failed: no cluster"):
        once.once(trigger(), refuse, pause=timedelta(minutes=5))
    assert len(claims(shelf)) == 2
    assert once.once(trigger(), lambda: ENDED)[1]


def claimed(shelf: Shelf, **changes: object) -> Trigger:
    """Leave a claim without an end, as a process that died would."""
    made = once._claim(open_storage(shelf.address), trigger(**changes.pop("job", {})), 1)
    altered = made.model_copy(update=changes)
    shelf.put(f"triggers/{made.trigger.id}/0001.claim.json", altered.line())
    return made.trigger


def test_a_claim_of_a_living_process_stands(shelf: Shelf) -> None:
    with pytest.raises(RunError, match="under way") as error:
        once.once(claimed(shelf), lambda: DONE)
    assert f"process {os.getpid()}" in error.value.where


def test_a_claim_of_a_dead_process_is_taken_over(shelf: Shelf) -> None:
    made = claimed(shelf, pid_started=1.0)  # the number was given to another process since
    assert [record.state for record in once.records()] == ["DEAD"]
    assert once.once(made, lambda: DONE)[1]
    assert claims(shelf) == ["0001.claim.json", "0002.claim.json", "0002.end.json"]


@pytest.mark.parametrize(
    ("engine", "minutes", "dead"),
    [("local", 20, False), ("local", 25 * 60, True), ("sagemaker", 10, False), ("sagemaker", 20, True)],
)
def test_another_machines_claim_stands_as_long_as_its_engine_needs(engine: str, minutes: int, dead: bool) -> None:
    when = datetime.now(UTC) - timedelta(minutes=minutes)
    made = Trigger.of("ci", "commit", Job(RECIPE, engine))
    claim = Claim(trigger=made, number=1, time=when, host="elsewhere", pid=1, pid_started=1, nonce="n")
    assert claim.is_dead() == dead
    assert Record(claim, None).state == ("DEAD" if dead else "RUNNING")


def test_a_cancelled_run_is_gone_on_with(shelf: Shelf) -> None:
    states = iter(["CANCELLED", "SUCCEEDED"])
    for now in (True, True, False):
        record, launched = once.once(trigger(), lambda: Outcome("local", "run-1", next(states)))
        assert launched == now
    assert record.state == "SUCCEEDED"


# --- launching --------------------------------------------------------------------------------------------------------


def test_a_distributed_engine_is_told_the_trigger_and_nothing_stays_behind(monkeypatch, tmp_path) -> None:
    """The engine's own module is the contract; a stand-in shows what it is called with."""
    seen: list[object] = []
    module = ModuleType("assay.pipelines.engines.kubeflow.engine")

    def run(*arguments: object) -> Outcome:
        seen.extend([*arguments[:4], os.environ[launch.TRIGGER]])
        return DONE

    module.run = run
    package = ModuleType("assay.pipelines.engines.kubeflow")
    monkeypatch.setitem(sys.modules, "assay.pipelines.engines.kubeflow", package)
    monkeypatch.setitem(sys.modules, "assay.pipelines.engines.kubeflow.engine", module)
    monkeypatch.delenv(launch.TRIGGER, raising=False)
    job = Job(RECIPE, "kubeflow", "s3://rows/new", tmp_path / "deploy.yaml", wait=False)
    assert launch.launch(job, "abc", lambda event: None) == DONE
    assert seen == [RECIPE, "s3://rows/new", tmp_path / "deploy.yaml", False, "abc"]
    assert launch.TRIGGER not in os.environ


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(RecipeError, match="no engine 'airflow'") as error:
        launch.launch(Job(RECIPE, "airflow"), "abc", lambda event: None)
    assert "kubeflow" in error.value.fix


@dsl.pipeline(name="training")
def training():
    trained = steps.train(steps=60)
    steps.weigh(model=trained.outputs["model"])


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("JOURNAL", "")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    path = os.environ["PYTHONPATH"]
    made = Bench(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FIXTURES), path]))
    monkeypatch.setenv("ASSAY_HOME", str(made.home))
    monkeypatch.delenv("ASSAY_REGISTRY", raising=False)
    return made


def fire(ir: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(FIXTURES / "fire.py"), str(ir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_a_kill_in_the_middle_still_gives_one_run(bench: Bench) -> None:
    """kill -9 while the step trains: the same trigger goes on with the run, from its checkpoint; a third is told."""
    ir = bench.compile(training)
    victim = fire(ir)
    until(lambda: any(file.read_text().count("\n") > 5 for file in bench.home.rglob("progress.jsonl")))
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    run, state, now = fire(ir).communicate(timeout=120)[0].split()
    assert (state, now) == ("SUCCEEDED", "True")
    assert fire(ir).communicate(timeout=120)[0].split() == [run, "SUCCEEDED", "False"]
    assert [record.id for record in store.list_runs(bench.home)] == [run]
    first, second = bench.lines("train")
    assert first["start"] == 0
    assert second["start"] > 0


def test_a_run_that_ended_before_the_record_did_is_not_run_again(bench: Bench, monkeypatch) -> None:
    ir = bench.compile(training)
    monkeypatch.setattr(launch, "_compile", lambda job, root: ir)
    made = trigger()

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(once, "_end", crash)
        with pytest.raises(KeyboardInterrupt):
            once.once(made, lambda: launch.launch(Job(RECIPE), made.id, lambda event: None))
    monkeypatch.setattr(Claim, "is_dead", lambda claim: True)
    record, _ = once.once(made, lambda: launch.launch(Job(RECIPE), made.id, lambda event: None))
    assert len(store.list_runs(bench.home)) == len(bench.lines("train")) == 1
    assert record.state == "SUCCEEDED"
