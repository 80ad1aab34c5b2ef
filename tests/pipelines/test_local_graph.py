# ruff: noqa: B006, UP045  kfp reads defaults, and knows Optional[X], not X | None
"""Every construct of the IR, run for real by the local engine."""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Optional

import pytest
from kfp import dsl

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
import steps
from bench import Bench, states

from assay.components.contracts.errors import RecipeError, RunError
from assay.pipelines.engines.local import engine


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("JOURNAL", "")
    monkeypatch.setenv("PYTHONPATH", "")
    return Bench(tmp_path)


def test_a_gate_on_a_named_float_against_an_int_runs(bench):
    @dsl.pipeline(name="gate")
    def pipeline():
        measured = steps.facts()
        with dsl.If(measured.outputs["rate"] > 0):  # kfp.local skips this body and says SUCCESS
            steps.echo(text="promoted")
        with dsl.If(measured.outputs["rate"] > 1):
            steps.double(n=1)

    record = bench.run(pipeline)
    assert record.state == "SUCCEEDED", record.message
    assert bench.ran() == {"facts": 1, "echo": 1}
    assert states(record)["condition-2/double"] == "SKIPPED"
    assert "condition is false" in record.tasks["condition-2/double"].message


def test_branches_and_one_of_parameters_and_artifacts(bench):
    @dsl.pipeline(name="branches")
    def pipeline(quote: str = "it's", flag: bool = True, limit: int = 3):
        measured = steps.facts()
        with dsl.If(measured.outputs["n"] > limit):
            one = steps.double(n=1)
        with dsl.Elif(measured.outputs["n"] == limit):
            two = steps.double(n=2)
            with dsl.If(quote == "it's"), dsl.If(flag == True):  # noqa: E712
                steps.echo(text="deep")
        with dsl.Else():
            three = steps.double(n=3)
        steps.weigh(model=dsl.OneOf(one.outputs["out"], two.outputs["out"], three.outputs["out"]))
        with dsl.If(measured.outputs["good"] == False):  # noqa: E712
            yes = steps.echo(text="yes")
        with dsl.Else():
            no = steps.echo(text="no")
        steps.settle(settings={"a": 1}, prompt=dsl.OneOf(yes.output, no.output))

    record = bench.run(pipeline)
    assert record.state == "SUCCEEDED", record.message
    assert sorted(line["text"] for line in bench.lines("echo")) == ["deep", "no"]
    assert bench.output(record, "weigh") == "4"
    assert json.loads(bench.output(record, "settle"))[1] == "no"


def test_loops_over_everything(bench):
    @dsl.pipeline(name="loops")
    def pipeline(given: list[int] = [5, 6], table: list[dict] = [{"n": 7, "s": "x"}, {"n": 8, "s": "y"}]):
        measured = steps.facts()
        with dsl.ParallelFor([1, 2], parallelism=1) as n:
            static = steps.double(n=n)
            with dsl.ParallelFor(["a", "b"]) as letter:
                inner = steps.double(n=n, suffix=letter)
        with dsl.ParallelFor(given) as n:
            steps.double(n=n)
        with dsl.ParallelFor(table) as row:
            steps.double(n=row.n, suffix=row.s)
        with dsl.ParallelFor(measured.outputs["many"]) as n:
            named = steps.double(n=n)
        steps.collect(models=dsl.Collected(static.outputs["out"]), numbers=dsl.Collected(static.outputs["Output"]))
        steps.collect(models=dsl.Collected(inner.outputs["out"]), numbers=[])
        steps.collect(models=dsl.Collected(named.outputs["out"]), numbers=dsl.Collected(named.outputs["Output"]))

    record = bench.run(pipeline)
    assert record.state == "SUCCEEDED", record.message
    doubled = sorted((line["n"], line["suffix"], line["kind"]) for line in bench.lines("double"))
    wanted = [(1, ""), (1, "a"), (1, "b"), (2, ""), (2, "a"), (2, "b"), (5, ""), (6, ""), (7, "x"), (8, "y")]
    assert {(n, suffix) for n, suffix, _ in doubled} == {*wanted, (1, ""), (2, ""), (3, "")}
    assert {kind for *_, kind in doubled} == {"int"}
    assert json.loads(bench.output(record, "collect")) == [["2", "4"], [2, 4]]
    assert json.loads(bench.output(record, "collect-2"))[0] == ["2a", "2b", "4a", "4b"]
    assert json.loads(bench.output(record, "collect-3")) == [["6", "2", "4"], [6, 2, 4]]


def test_a_loop_keeps_its_limit_and_collects_what_a_condition_let_pass(bench):
    @dsl.pipeline(name="limit")
    def pipeline():
        with dsl.ParallelFor([0.3, 0.31, 0.32, 0.33], parallelism=2) as seconds:
            steps.wait(name="w", seconds=seconds)
        with dsl.ParallelFor([1, 2, 3]) as n, dsl.If(n > 1):
            some = steps.double(n=n)
        steps.collect(models=dsl.Collected(some.outputs["out"]), numbers=dsl.Collected(some.outputs["Output"]))

    record = bench.run(pipeline, cores=8)
    assert record.state == "SUCCEEDED", record.message
    assert most_at_once(bench.lines("wait")) == 2
    assert json.loads(bench.output(record, "collect")) == [["4", "6"], [4, 6]]


def test_exit_handler_sees_how_it_ended(bench):
    @dsl.pipeline(name="guarded")
    def pipeline(how: str):
        with dsl.ExitHandler(steps.final(), name="guard"):
            steps.fail(how=how)
            steps.echo(text="beside")

    record = bench.run(pipeline, parameters={"how": "user"})
    assert record.state == "FAILED"
    assert bench.ran() == {"fail": 1, "echo": 1, "final": 1}
    [line] = bench.lines("final")
    assert (line["state"], line["task"]) == ("FAILED", "exit-handler-1")
    assert "row 7 has no text" in line["message"]
    failed = record.tasks["exit-handler-1/fail"]
    assert failed.exit_code == 2
    assert failed.message == "rows.jsonl:7: row 7 has no text\n  → give it one"


def test_failure_stops_what_depends_on_it_and_nothing_else(bench):
    @dsl.pipeline(name="failure")
    def pipeline():
        bad = steps.fail(how="bug")
        bad.set_retry(0)
        after = steps.double(n=bad.output)
        steps.weigh(model=after.outputs["out"])
        steps.echo(text="late").after(steps.wait(name="a", seconds=0.5))
        rows = steps.write(text="w")
        steps.optional(text="cleanup", data=rows.outputs["out"]).after(bad).ignore_upstream_failure()

    record = bench.run(pipeline)
    assert record.state == "FAILED"
    assert bench.ran() == {"fail": 1, "wait": 1, "echo": 1, "write": 1, "optional": 1}
    assert states(record)["double"] == states(record)["weigh"] == "SKIPPED"
    assert record.tasks["double"].message == "fail failed"
    assert record.tasks["weigh"].message == "double was skipped"
    assert "ValueError: a bug in the step" in record.tasks["fail"].message
    assert "log.txt" in record.tasks["fail"].message


@pytest.mark.parametrize(
    ("how", "state", "message"),
    [
        ("nothing", "FAILED", "was not written"),
        ("killed", "FAILED", "killed by SIGKILL"),
        ("stopped", "CANCELLED", "resume the run"),
    ],
)
def test_ends_that_are_not_success(bench, how, state, message):
    @dsl.pipeline(name="ends")
    def pipeline():
        steps.fail(how=how).set_retry(2, "0s") if how == "stopped" else steps.fail(how=how)

    record = bench.run(pipeline)
    assert record.state == state
    assert message in record.tasks["fail"].message
    assert bench.ran() == {"fail": 1}


def test_nested_pipelines_f_strings_defaults_and_containers(bench):
    @dsl.pipeline(name="inner")
    def inner(text: str) -> str:
        return steps.echo(text=text).output

    @dsl.pipeline(name="outer")
    def outer(word: str = "{{$.pipeline_job_name}} it's", on: Optional[str] = None) -> str:
        written = steps.write(text="some words")
        said = inner(text=f"<{word}|{written.outputs['Output']}>")
        steps.optional(text=on)
        steps.optional(text=dsl.PIPELINE_JOB_NAME_PLACEHOLDER, data=written.outputs["out"])
        steps.settle(settings={"p": "{{$.inputs.parameters['x']}}", "n": 3}, prompt="{{$.nothing}}")
        steps.shell(text="a b", data=written.outputs["out"])
        container = steps.shell(text="c", data=written.outputs["out"], flag="f")
        steps.read(data=container.outputs["out"])
        return said.output

    record = bench.run(outer)
    assert record.state == "SUCCEEDED", record.message
    assert record.outputs == {"Output": "<{{$.pipeline_job_name}} it's|10>"}
    assert bench.output(record, "optional") == "None False"
    assert bench.output(record, "optional-2") == f"{record.id} True"
    assert json.loads(bench.output(record, "settle")) == [
        {"p": "{{$.inputs.parameters['x']}}", "n": 3},
        "{{$.nothing}}",
    ]
    assert bench.output(record, "shell", "size") == 2  # its own argument, and --plain
    assert bench.output(record, "shell-2", "size") == 3
    assert bench.artifact(record, "shell", "out").read_text() == "<a b>:some words"
    assert bench.output(record, "read") == "<c>:some words"


def test_a_program_that_is_not_there(bench):
    @dsl.container_component
    def missing():
        return dsl.ContainerSpec(image="x", command=["no-such-program"])

    @dsl.pipeline(name="program")
    def pipeline():
        missing()

    record = bench.run(pipeline)
    assert record.state == "FAILED"
    assert "'no-such-program' cannot be started: No such file or directory" in record.tasks["missing"].message


def test_a_comparison_that_makes_no_sense_fails_instead_of_skipping(bench):
    @dsl.pipeline(name="sense")
    def pipeline(n: int = 1):
        with dsl.If(n > 1):
            steps.echo(text="x")

    path = bench.compile(pipeline)
    path.write_text(path.read_text().replace("> 1", "> '1'"))
    record = bench.run(path)
    assert record.state == "FAILED"
    assert "compares 1 with '1'" in record.tasks["condition-1"].message


def test_importer(bench, tmp_path):
    @dsl.pipeline(name="import")
    def pipeline(uri: str, note: str = "n"):
        rows = dsl.importer(artifact_uri=uri, artifact_class=dsl.Dataset, metadata={"note": note})
        steps.read(data=rows.output)

    file = tmp_path / "rows.txt"
    file.write_text("rows")
    for uri in (str(file), f"file://{file}"):
        record = bench.run(pipeline, parameters={"uri": uri})
        assert bench.output(record, "read") == "rows"
    record = bench.run(pipeline, parameters={"uri": str(tmp_path / "absent")})
    assert (record.state, states(record)["read"]) == ("FAILED", "SKIPPED")
    assert "no such file or folder" in record.tasks["importer"].message
    record = bench.run(pipeline, parameters={"uri": "s3://bucket/rows"})
    assert "download it" in record.tasks["importer"].message


def test_parameters_are_checked_before_anything_runs(bench):
    @dsl.pipeline(name="parameters")
    def pipeline(n: int):
        steps.double(n=n)

    path = bench.compile(pipeline)
    for given, message in [({}, "no value"), ({"n": 1, "m": 2}, "no parameter 'm'"), ({"n": "x"}, "NUMBER_INTEGER")]:
        with pytest.raises(RunError, match=message):
            bench.run(path, parameters=given)
    assert not (bench.home / "runs").exists()


def test_a_condition_that_cannot_be_read_stops_the_run_before_it_starts(bench):
    @dsl.pipeline(name="broken")
    def pipeline(word: str = "a"):
        with dsl.If(word == "x' + 'y"):
            steps.echo(text="never")

    path = bench.compile(pipeline)
    path.write_text(path.read_text().replace("==", "~="))
    with pytest.raises(RecipeError, match="cannot be parsed"):
        bench.run(path)


def test_large_parameters_travel_by_file(bench):
    @dsl.pipeline(name="large")
    def pipeline(text: str):
        steps.write(text=text)

    record = bench.run(pipeline, parameters={"text": "x" * 300_000})
    assert bench.output(record, "write") == 300_000


def test_two_wide_steps_never_overlap(bench):
    @dsl.pipeline(name="cores")
    def pipeline():
        for name in ("a", "b"):
            steps.wait(name=name, seconds=0.4).set_cpu_request("2")
        steps.wait(name="huge", seconds=0.2).set_cpu_limit("64")
        steps.wait(name="c", seconds=0.3)
        steps.wait(name="d", seconds=0.31)

    record = bench.run(pipeline, cores=2)
    assert record.state == "SUCCEEDED", record.message
    lines = {line["name"]: line for line in bench.lines("wait")}
    wide = [lines["a"], lines["b"], lines["huge"]]
    assert most_at_once(wide) == 1
    assert all(most_at_once([one, other]) == 1 for one in wide for other in (lines["c"], lines["d"]))
    assert {name: (line["cpus"], line["threads"]) for name, line in lines.items()} == {
        "a": (2, "2"),
        "b": (2, "2"),
        "huge": (2, "2"),
        "c": (1, "1"),
        "d": (1, "1"),
    }


def most_at_once(lines):
    return max(sum(other["start"] <= line["start"] < other["end"] for other in lines) for line in lines)


def test_events_and_plan(bench):
    @dsl.pipeline(name="told")
    def pipeline():
        trained = steps.train(steps=6).set_display_name("Train it")
        steps.weigh(model=trained.outputs["model"])

    path = bench.compile(pipeline)
    planned = engine.plan(path)
    assert [(task.path, task.title, task.is_container) for task in planned] == [
        ("train", "Train it", True),
        ("weigh", "weigh", True),
    ]
    record = bench.run(path)
    assert record.state == "SUCCEEDED", record.message
    kinds = [event.kind for event in bench.events]
    assert (kinds[0], kinds[-1]) == ("run_started", "run_finished")
    assert list(bench.events[0].tasks) == planned
    progress = [event.progress for event in bench.events if event.kind == "task_progress"]
    assert progress[-1]["done"] == progress[-1]["total"] == 6
    assert "loss" in progress[-1]
    assert [event.state for event in bench.events if event.task == "train" and event.kind == "task_state"] == [
        "RUNNING",
        "SUCCEEDED",
    ]


def test_a_view_that_breaks_does_not_break_the_run(bench, capsys):
    def broken(event):
        raise RuntimeError("the view broke")

    @dsl.pipeline(name="view")
    def pipeline():
        steps.echo(text="x")

    record = bench.run(pipeline, on_event=broken)
    assert record.state == "SUCCEEDED", record.message
    assert "the view broke" in capsys.readouterr().err


def test_the_engine_runs_in_any_thread(bench):
    @dsl.pipeline(name="thread")
    def pipeline():
        steps.echo(text="x")

    path, found = bench.compile(pipeline), []
    thread = threading.Thread(target=lambda: found.append(bench.run(path).state))
    thread.start()
    thread.join()
    assert found == ["SUCCEEDED"]


def test_a_home_that_cannot_be_written_is_said_plainly(bench, tmp_path):
    @dsl.pipeline(name="home")
    def pipeline():
        steps.echo(text="x")

    bench.home = tmp_path / "file"
    bench.home.write_text("in the way")
    started = time.monotonic()
    with pytest.raises(RunError, match="cannot write: Not a directory"):
        bench.run(pipeline)
    assert time.monotonic() - started < 5
