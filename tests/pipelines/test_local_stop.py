"""Kills, stops, time limits, retries: whatever happens, what is finished stays finished."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from kfp import dsl, kubernetes

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
import steps
from bench import FIXTURES, Bench, states

from assay.components.contracts.artifacts import read_manifest
from assay.components.contracts.errors import RecipeError, RunError
from assay.pipelines.engines.local import engine, store


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("JOURNAL", "")
    monkeypatch.setenv("PYTHONPATH", "")
    return Bench(tmp_path)


@dsl.pipeline(name="training")
def training():
    before = steps.double(n=4)
    trained = steps.train(steps=40).after(before)
    beside = steps.write(text="beside").set_caching_options(False)
    after = steps.weigh(model=trained.outputs["model"])
    steps.echo(text=after.output).after(beside)


def start(bench, ir):
    return subprocess.Popen(
        [sys.executable, str(FIXTURES / "drive.py"), str(bench.home), str(ir)], stdout=subprocess.PIPE, text=True
    )


def until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def progress(bench, task="train"):
    files = list((bench.home / "runs").glob(f"*/tasks/{task}/progress.jsonl"))
    return len(files[0].read_text().splitlines()) if files else 0


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_kill_the_engine_and_resume(bench, tmp_path):
    path = bench.compile(training)
    undisturbed = bench.run(path)
    assert undisturbed.state == "SUCCEEDED", undisturbed.message
    wanted = read_manifest(bench.artifact(undisturbed, "train", "model"))
    shutil.rmtree(bench.home)
    bench.journal.unlink()

    process = start(bench, path)
    until(lambda: progress(bench) >= 10)
    process.kill()
    process.wait()
    [record] = store.list_runs(bench.home)
    assert record.state == "INTERRUPTED"
    assert bench.ran() == {"double": 1, "write": 1, "train": 1}

    resumed = bench.resume()
    assert resumed.state == "SUCCEEDED", resumed.message
    assert resumed.id == record.id
    assert bench.ran() == {"double": 1, "write": 1, "train": 2, "weigh": 1, "echo": 1}
    first, second = bench.lines("train")
    assert gone(first["pid"])
    assert second["start"] >= 10  # it went on, it did not begin again
    assert read_manifest(bench.artifact(resumed, "train", "model")) == wanted
    assert not any((bench.home / "work").iterdir())
    assert bench.resume().state == "SUCCEEDED"  # a finished run has nothing left to do
    assert len(bench.lines()) == 6


def test_a_killed_engine_leaves_no_process_behind(bench):
    @dsl.pipeline(name="orphans")
    def pipeline():
        steps.children()

    process = start(bench, bench.compile(pipeline))
    until(lambda: progress(bench, "children") == 1)
    [line] = bench.lines("children")
    process.kill()
    process.wait()
    until(lambda: gone(line["pid"]) and gone(line["child"]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_and_resume(bench, number):
    process = start(bench, bench.compile(training))
    until(lambda: progress(bench) >= 5)
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == "CANCELLED"
    record = store.load_run(bench.home)
    assert (record.state, record.tasks["train"].state, record.tasks["weigh"].state) == (
        "CANCELLED",
        "CANCELLED",
        "PENDING",
    )
    assert record.tasks["train"].exit_code == 75
    assert number.name in record.message
    assert bench.resume().state == "SUCCEEDED"
    assert bench.ran()["double"] == 1
    assert bench.lines("train")[1]["start"] >= 5


def test_two_processes_do_not_drive_one_run(bench):
    process = start(bench, bench.compile(training))
    until(lambda: progress(bench) >= 1)
    assert store.load_run(bench.home).state == "RUNNING"
    with pytest.raises(RunError, match="another process drives this run"):
        bench.resume()
    process.terminate()
    process.communicate(timeout=20)


def test_time_limits(bench):
    @dsl.pipeline(name="limits")
    def pipeline():
        kubernetes.set_timeout(steps.wait(name="a", seconds=60.0), 1)
        steps.wait(name="b", seconds=61.0).platform_config["local"] = {"timeout": 1.5}

    started = time.monotonic()
    record = bench.run(pipeline)
    assert time.monotonic() - started < 20
    assert states(record) == {"wait": "FAILED", "wait-2": "FAILED"}
    assert "it took longer than 1 s" in record.tasks["wait"].message
    assert "it took longer than 1.5 s" in record.tasks["wait-2"].message


def test_the_pipelines_own_time_limit(bench):
    @dsl.pipeline(name="limit", pipeline_config=dsl.PipelineConfig(active_deadline_seconds=1))
    def pipeline():
        steps.wait(name="a", seconds=60.0)

    record = bench.run(pipeline)
    assert (record.state, record.message) == ("CANCELLED", "wait: the pipeline's time limit is over")


def test_settings_of_this_engine_are_checked(bench):
    @dsl.pipeline(name="settings")
    def pipeline():
        steps.echo(text="x").platform_config["local"] = {"time_out": 1}

    with pytest.raises(RecipeError, match="no setting 'time_out'"):
        bench.run(pipeline)


def test_retries(bench):
    @dsl.pipeline(name="retries")
    def pipeline(failures: int):
        steps.flaky(failures=failures).set_retry(2, "0s")

    record = bench.run(pipeline, parameters={"failures": 2})
    assert record.state == "SUCCEEDED", record.message
    assert bench.ran() == {"flaky": 3}
    assert [event.message[:24] for event in bench.events if event.kind == "log"] == [
        "attempt 1 failed, next i",
        "attempt 2 failed, next i",
    ]
    record = bench.run(pipeline, parameters={"failures": 5})
    assert (record.state, bench.ran()) == ("FAILED", {"flaky": 3})
    assert "the network went away" in record.tasks["flaky"].message


def test_what_the_user_did_wrong_is_not_tried_again(bench):
    @dsl.pipeline(name="fault")
    def pipeline():
        steps.fail(how="user").set_retry(5, "60s")

    started = time.monotonic()
    assert bench.run(pipeline).state == "FAILED"
    assert bench.ran() == {"fail": 1}
    assert time.monotonic() - started < 20


def test_a_wait_between_attempts_can_be_stopped(bench):
    @dsl.pipeline(name="backoff")
    def pipeline():
        steps.fail(how="bug").set_retry(5, "600s", backoff_max_duration="600s")

    process = start(bench, bench.compile(pipeline))
    until(lambda: bench.ran() == {"fail": 1})
    time.sleep(1)
    process.terminate()
    assert process.communicate(timeout=10)[0] == "CANCELLED"


def test_a_failed_run_goes_on_after_the_cause_is_gone(bench, tmp_path):
    @dsl.pipeline(name="mended")
    def pipeline(uri: str):
        steps.echo(text="once")
        rows = dsl.importer(artifact_uri=uri, artifact_class=dsl.Dataset)
        steps.read(data=rows.output)

    rows = tmp_path / "rows.txt"
    assert bench.run(pipeline, parameters={"uri": str(rows)}).state == "FAILED"
    rows.write_text("here now")
    record = bench.resume()
    assert record.state == "SUCCEEDED"
    assert bench.ran() == {"echo": 1, "read": 1}
    assert states(record)["echo"] == "SUCCEEDED"


def test_anew_is_anew_also_after_a_stop(bench):
    @dsl.pipeline(name="anew")
    def pipeline():
        steps.weigh(model=steps.double(n=2).outputs["out"])

    path = bench.compile(pipeline)
    bench.run(path)
    record = bench.run(path, from_step="double")
    assert bench.ran() == {"double": 1, "weigh": 1}
    assert bench.resume().id == record.id
    assert len(bench.lines()) == 2


def test_a_record_that_cannot_be_written_is_said_and_nothing_is_lost(bench):
    @dsl.pipeline(name="full")
    def pipeline():
        steps.echo(text="kept")

    path, told = bench.compile(pipeline), []

    def sabotage(event):
        if event.kind == "task_state" and not told:
            told.append(event)
            record = store.run_folder(bench.home, event.run_id) / "run.json"
            record.unlink()
            record.mkdir()

    with pytest.raises(RunError, match="cannot write.*\n.*assay resume"):
        bench.run(path, on_event=sabotage)
    shutil.rmtree(bench.home / "runs")
    bench.run(path)
    assert bench.ran() == {}


def test_latest_and_unknown_runs(bench):
    with pytest.raises(RunError, match="no run yet"):
        store.load_run(bench.home)

    @dsl.pipeline(name="listed")
    def pipeline():
        steps.echo(text="x")

    first, second = bench.run(pipeline, name="one"), bench.run(pipeline, name="two", metadata={"a": 1})
    assert [record.id for record in store.list_runs(bench.home)] == [second.id, first.id]
    assert store.load_run(bench.home).metadata == {"a": 1}
    assert store.load_run(bench.home, str(store.run_folder(bench.home, first.id))).name == "one"
    with pytest.raises(RunError, match="no run 'ghost'"):
        engine.resume("ghost", home=bench.home)


def test_the_engine_needs_no_heavy_library():
    code = (
        "import sys, assay.pipelines.engines.local.engine;"
        "sys.exit(','.join({'kfp', 'torch', 'mlflow', 'pandas', 'numpy'} & set(sys.modules)) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
