"""The emulator: real steps in private /opt/ml folders, S3 by moto's server, every construct of a definition."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from assay.components.contracts.errors import RunError
from assay.components.runtime import s3
from assay.pipelines.engines.sagemaker import emulate
from assay.pipelines.engines.sagemaker.emulation.aws import client, provide
from assay.pipelines.engines.sagemaker.emulation.jobs import Fault
from fixtures import aws
from fixtures.definitions import Book, condition, equals, get, join, model, output, parameter

ANY = [{"ExceptionType": ["SageMaker.CAPACITY_ERROR", "SageMaker.JOB_INTERNAL_ERROR"], "MaxAttempts": 2}]


@pytest.fixture(scope="module")
def server():
    with aws.server() as environment:
        yield environment


class Account:
    """An emulator with its folder, its bucket and a journal of what really ran."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.aws = folder, environment
        self.client = client("s3", environment)
        self.book = Book(f"s3://{aws.bucket(self.client)}/assay", folder / "tasks")
        self.events: list[tuple[str, str]] = []
        path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.emulator = emulate.Emulator(
            folder / "home",
            environment,
            environment={"JOURNAL": str(folder / "journal"), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            containers=False,
            pace=0.01,
            grace=20,
            on_event=lambda event: self.events.append((event.task, event.state)),
        )

    def run(self, *steps, parameters=None, given=None, faults=None):
        self.definition = self.book.definition(*steps, parameters=parameters)
        provide(self.definition, self.book.folder, self.aws)
        return self.emulator.run(self.definition, "steps", given, faults)

    def journal(self) -> list[dict]:
        path = self.folder / "journal"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def params(self, execution, step: str) -> dict:
        outputs = execution.steps[step].properties["ProcessingOutputConfig"]["Outputs"]
        uri = next(entry["S3Output"]["S3Uri"] for entry in outputs if entry["OutputName"] == "params")
        bucket, key = s3.split(f"{uri}/params.json")
        return json.loads(self.client.get_object(Bucket=bucket, Key=key)["Body"].read())


@pytest.fixture
def account(tmp_path, server):
    return Account(tmp_path, server)


def states(execution) -> dict[str, str]:
    return {name: step.state for name, step in execution.steps.items()}


INTEGER, TEXT = {"Output": "NUMBER_INTEGER"}, {"Output": "STRING"}


@pytest.mark.parametrize(("text", "taken", "left"), [("a b", "short", "long"), ("a b c d", "long", "short")])
def test_values_and_files_go_from_step_to_step_and_the_condition_takes_one_branch(account, text, taken, left):
    book = account.book
    written = book.processing(
        "write",
        "write",
        given={"text": ("STRING", get("Parameters.text"))},
        outputs={"out": "system.Dataset"},
        params=INTEGER,
    )
    read = book.processing("read", "read", artifacts={"data": output("write", "out")}, params=TEXT)
    short = book.processing("short", "echo", given={"text": ("STRING", parameter("write"))}, params=TEXT)
    long = book.processing("long", "echo", given={"text": ("STRING", parameter("read"))}, params=TEXT)
    branch = condition("is-short", equals(parameter("write"), 3), [short], [long])
    execution = account.run(
        branch, read, written, parameters=[{"Name": "text", "Type": "String"}], given={"text": text}
    )
    assert execution.state == "Succeeded", execution.reason
    assert states(execution) == {
        "write": "Succeeded",
        "read": "Succeeded",
        "is-short": "Succeeded",
        taken: "Succeeded",
        left: "NotStarted",
    }
    assert account.params(execution, "read") == {"Output": text}
    assert account.params(execution, taken) == {"Output": "3" if taken == "short" else text}
    assert ("write", "RUNNING") in account.events
    assert (left, "SKIPPED") in account.events


def test_a_training_leaves_one_prefix_from_which_the_next_step_takes_its_folder(account):
    book = account.book
    trained = book.training("train", "train", {"steps": ("NUMBER_INTEGER", 5.0)}, {"model": "system.Model"})
    weighed = book.processing("weigh", "weigh", artifacts={"model": (model("train"), "model")}, params=TEXT)
    execution = account.run(trained, weighed)
    assert execution.state == "Succeeded", execution.reason
    assert account.params(execution, "weigh") == {"Output": "wwwww"}
    described = execution.steps["train"].properties
    assert described["ModelArtifacts"]["S3ModelArtifacts"].endswith(f"{described['TrainingJobName']}/output/model/")


def test_an_input_that_has_no_place_of_its_own_is_fetched(account):
    book = account.book
    written = book.processing(
        "write", "write", constants={"text": ("STRING", "x")}, outputs={"out": "system.Dataset"}, params=INTEGER
    )
    read = book.processing("read", "read", fetch={"data": output("write", "out")}, params=TEXT)
    execution = account.run(written, read)
    assert execution.state == "Succeeded", execution.reason
    assert account.params(execution, "read") == {"Output": "x"}


def cached_chain(book, text: str = "x", expires: str = "P30D", environment=None):
    caching = {"CacheConfig": {"Enabled": True, "ExpireAfter": expires}}
    written = book.processing(
        "write",
        "write",
        constants={"text": ("STRING", text)},
        outputs={"out": "system.Dataset"},
        params=INTEGER,
        environment=environment or {},
        **caching,
    )
    return written, book.processing("read", "read", artifacts={"data": output("write", "out")}, params=TEXT, **caching)


def test_the_same_step_comes_from_the_cache_with_the_outputs_of_the_execution_that_ran_it(account):
    first = account.run(*cached_chain(account.book))
    second = account.run(*cached_chain(account.book))
    third = account.run(*cached_chain(account.book))
    assert [step.cached for step in first.steps.values()] == [False, False]
    assert [step.cached for step in (*second.steps.values(), *third.steps.values())] == [True] * 4
    assert second.steps["write"].properties == first.steps["write"].properties
    assert [line["step"] for line in account.journal()] == ["write", "read"]
    assert ("read", "CACHED") in account.events


@pytest.mark.parametrize(
    "change", [{"text": "y"}, {"environment": {"A": "1"}}, {"expires": "PT0S"}], ids=["input", "environment", "age"]
)
def test_a_changed_request_or_an_old_result_runs_again(account, change):
    account.run(*cached_chain(account.book))
    again = account.run(*cached_chain(account.book, **change))
    assert not again.steps["write"].cached
    assert [line["step"] for line in account.journal()] == ["write", "read"] * 2


def test_a_retry_policy_repeats_what_it_names_and_nothing_else(account):
    step = account.book.processing("echo", "echo", constants={"text": ("STRING", "x")}, params=TEXT, RetryPolicies=ANY)
    twice = [Fault("SageMaker.CAPACITY_ERROR"), Fault("SageMaker.CAPACITY_ERROR")]
    execution = account.run(step, faults={"echo": twice})
    assert (execution.state, execution.steps["echo"].attempts) == ("Succeeded", 3)
    execution = account.run(step, faults={"echo": [*twice, Fault("SageMaker.CAPACITY_ERROR")]})
    assert (execution.state, execution.steps["echo"].attempts) == ("Failed", 3)
    execution = account.run(step, faults={"echo": [Fault("Step.THROTTLING")]})
    assert (execution.state, execution.steps["echo"].attempts) == ("Failed", 1)


def test_a_users_error_is_the_steps_reason_is_not_tried_again_and_ends_what_depends_on_it(account):
    book = account.book
    failing = book.processing("fail", "fail", constants={"how": ("STRING", "user")}, params=INTEGER, RetryPolicies=ANY)
    after = book.processing("after", "echo", given={"text": ("STRING", parameter("fail"))}, params=TEXT)
    never = book.processing("never", "echo", constants={"text": ("STRING", "x")}, params=TEXT)
    branch = condition("test", equals(parameter("fail"), 3), [never], [])
    other = book.processing("other", "echo", constants={"text": ("STRING", "x")}, params=TEXT)
    execution = account.run(failing, after, branch, other)
    assert execution.state == "Failed"
    assert states(execution) == {
        "fail": "Failed",
        "after": "NotStarted",
        "test": "NotStarted",
        "never": "NotStarted",
        "other": "Succeeded",
    }
    assert execution.steps["fail"].attempts == 1
    assert "rows.jsonl:7: row 7 has no text" in execution.steps["fail"].reason
    assert "exit code: 2" in execution.reason


@pytest.mark.parametrize("trigger", ["Any", "Failed"])
def test_a_step_that_waits_for_a_failure_runs_and_the_execution_says_so(account, trigger):
    book = account.book
    failing = book.processing("fail", "fail", constants={"how": ("STRING", "user")}, params=INTEGER)
    handler = book.processing(
        "handle",
        "echo",
        constants={"text": ("STRING", "x")},
        params=TEXT,
        DependsOn=[{"Step": "fail", "Trigger": trigger}],
    )
    execution = account.run(failing, handler)
    assert execution.steps["handle"].state == "Succeeded"
    assert execution.state == "CompletedWithFailures"


def test_a_step_that_waits_for_a_failure_does_not_run_without_one(account):
    book = account.book
    fine = book.processing("fine", "echo", constants={"text": ("STRING", "x")}, params=TEXT)
    handler = book.processing(
        "handle",
        "echo",
        constants={"text": ("STRING", "x")},
        params=TEXT,
        DependsOn=[{"Step": "fine", "Trigger": "Failed"}],
    )
    execution = account.run(fine, handler)
    assert (execution.state, execution.steps["handle"].state) == ("Succeeded", "NotStarted")


def checkpoint_reached(ml: Path) -> bool:
    path = ml / "checkpoints" / "step"
    return path.exists() and int(path.read_text() or 0) >= 5


def synced(account) -> bool:
    return bool(s3.objects(account.client, f"{account.book.root}/checkpoints/train/step"))


@pytest.mark.parametrize("grace", [20.0, 0.0], ids=["sigterm", "sigkill"])
@pytest.mark.parametrize("spot", [True, False], ids=["spot", "retry"])
def test_a_training_whose_machine_is_taken_away_goes_on_from_its_checkpoints(account, spot, grace):
    trained = account.book.training(
        "train",
        "train",
        {"steps": ("NUMBER_INTEGER", 60)},
        {"model": "system.Model"},
        spot=spot,
        RetryPolicies=ANY,
    )
    fault = Fault("SageMaker.JOB_INTERNAL_ERROR", lambda ml: checkpoint_reached(ml) and synced(account), grace)
    execution = account.run(trained, faults={"train": [fault]})
    assert execution.state == "Succeeded", execution.reason
    assert execution.steps["train"].attempts == (1 if spot else 2)
    first, second = [line["start"] for line in account.journal()]
    assert first == 0
    assert second > 0


def stop_when(account, reached) -> threading.Thread:
    def watch() -> None:
        deadline = time.monotonic() + 60
        while not reached() and time.monotonic() < deadline:
            time.sleep(0.05)
        account.emulator.stop()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_stopped_execution_is_retried_where_it_was(account):
    book = account.book
    before = book.processing("before", "echo", constants={"text": ("STRING", "x")}, params=TEXT)
    trained = book.training(
        "train", "train", {"steps": ("NUMBER_INTEGER", 80)}, {"model": "system.Model"}, DependsOn=["before"]
    )
    weighed = book.processing("weigh", "weigh", artifacts={"model": (model("train"), "model")}, params=TEXT)
    watcher = stop_when(account, lambda: any(account.folder.glob("home/executions/*/jobs/*train*/ml/checkpoints/step")))
    stopped = account.run(before, trained, weighed)
    watcher.join()
    assert stopped.state == "Stopped"
    assert states(stopped) == {"before": "Succeeded", "train": "Stopped", "weigh": "NotStarted"}
    done = account.emulator.retry(account.definition, stopped.id)
    assert done.state == "Succeeded", done.reason
    journal = account.journal()
    assert [line["step"] for line in journal] == ["echo", "train", "train", "weigh"]
    assert journal[2]["start"] > 0
    assert account.params(done, "weigh") == {"Output": "w" * 80}
    with pytest.raises(RunError, match="succeeded"):
        account.emulator.retry(account.definition, done.id)


def test_a_fail_step_ends_the_execution_with_its_words(account):
    fail = {"Name": "no", "Type": "Fail", "Arguments": {"ErrorMessage": join("bad: ", get("Parameters.why"))}}
    slow = account.book.processing(
        "slow", "wait", {"name": ("STRING", "a"), "seconds": ("NUMBER_DOUBLE", 60.0)}, params=TEXT
    )
    test = condition("test", equals(get("Parameters.why"), "rows"), [fail], [])
    parameters = [{"Name": "why", "Type": "String", "DefaultValue": "rows"}]
    execution = account.run(test, slow, parameters=parameters)
    assert (execution.state, execution.reason) == ("Failed", "bad: rows")
    assert execution.steps["slow"].state in ("Stopped", "NotStarted")


def test_a_loop_runs_its_body_for_each_item_at_most_so_many_at_once(account):
    book = account.book
    written = book.processing(
        "write",
        "write",
        given={"text": ("STRING", get("ForEach.CurrentItem.text"))},
        outputs={"out": "system.Dataset"},
        params=INTEGER,
    )
    read = book.processing("read", "read", artifacts={"data": output("write", "out")}, params=TEXT)
    for step in (written, read):  # each round writes to a prefix of its own, as a translator has to see to
        for entry in step["Arguments"]["ProcessingOutputConfig"]["Outputs"]:
            entry["S3Output"]["S3Uri"]["Std:Join"]["Values"].append(get("ForEach.CurrentItem.text"))
    items = [{"text": "a"}, {"text": "b"}]
    loop = {
        "Name": "loop",
        "Type": "ForEach",
        "Arguments": {"IterableItems": json.dumps(items), "MaxConcurrency": 2, "ForEachBody": [written, read]},
    }
    execution = account.run(loop)
    assert execution.state == "Succeeded", execution.reason
    assert [account.params(execution, f"read[{place}]")["Output"] for place in (0, 1)] == ["a", "b"]
    assert execution.steps["loop"].properties["SucceededStepCount"] == 2


@pytest.mark.parametrize(("limit", "together"), [(2, True), (1, False)])
def test_steps_that_do_not_depend_on_each_other_run_together_up_to_the_limit(account, limit, together):
    account.emulator.limit = limit
    constants = {"seconds": ("NUMBER_DOUBLE", 1.5)}
    steps = [
        account.book.processing(name, "wait", {"name": ("STRING", name), **constants}, params=TEXT)
        for name in ("one", "two")
    ]
    assert account.run(*steps).state == "Succeeded"
    first, second = sorted(account.journal(), key=lambda line: line["start"])
    assert (second["start"] < first["end"]) is together


def test_a_number_where_a_text_is_wanted_and_a_long_argument_fail_as_on_the_service(account):
    book = account.book
    bare = book.processing("bare", "echo", constants={"text": ("STRING", "x")}, params=TEXT)
    bare["Arguments"]["AppSpecification"]["ContainerArguments"] = [get("Parameters.n")]
    long = book.processing("long", "echo", given={"text": ("STRING", get("Parameters.text"))}, params=TEXT)
    parameters = [
        {"Name": "n", "Type": "Integer", "DefaultValue": 3},
        {"Name": "text", "Type": "String", "DefaultValue": "x" * 300},
    ]
    execution = account.run(bare, long, parameters=parameters)
    assert states(execution) == {"bare": "Failed", "long": "Failed"}
    assert "Invalid type for parameter AppSpecification.ContainerArguments[0]" in execution.steps["bare"].reason
    assert "at most 256 pass" in execution.steps["long"].reason
    assert account.journal() == []


def test_data_that_is_not_there_and_a_job_that_takes_too_long_are_named(account):
    book = account.book
    lost = book.processing("lost", "read", artifacts={"data": f"{book.root}/nothing"}, params=TEXT)
    slow = book.processing("slow", "wait", {"name": ("STRING", "a"), "seconds": ("NUMBER_DOUBLE", 60.0)}, params=TEXT)
    slow["Arguments"]["StoppingCondition"] = {"MaxRuntimeInSeconds": 1}
    execution = account.run(lost, slow)
    assert "no S3 objects found" in execution.steps["lost"].reason
    assert "MaxRuntimeInSeconds (1)" in execution.steps["slow"].reason


def test_what_cannot_be_emulated_and_parameters_that_do_not_fit_are_refused(account):
    with pytest.raises(RunError, match="not emulated: {'l': 'Lambda'}"):
        account.run({"Name": "l", "Type": "Lambda", "Arguments": {}})
    declared = [{"Name": "n", "Type": "Integer"}, {"Name": "b", "Type": "Boolean", "DefaultValue": False}]
    definition = {"Parameters": declared}
    assert emulate.bind(definition, {"n": "3", "b": "True"}) == {"n": 3, "b": True}
    for given, said in [({}, "has no value"), ({"n": "x"}, "'x' is not a Integer"), ({"m": 1}, "no parameter 'm'")]:
        with pytest.raises(RunError, match=said):
            emulate.bind(definition, given)


def test_the_command_runs_a_compiled_definition(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    )
    book = Book("s3://a-bucket/assay", tmp_path / "steps.tasks")
    step = book.processing("settle", "optional", params=TEXT, environment={"JOURNAL": str(tmp_path / "journal")})
    (tmp_path / "steps.json").write_text(json.dumps(book.definition(step)))
    line = [str(tmp_path / "steps.json"), "--home", str(tmp_path / "home"), "--processes"]
    assert emulate.main(line) == 0
    assert "succeeded settle" in capsys.readouterr().err
    assert emulate.main([*line, "--parameter", "x=1"]) == 2
    assert "there is no parameter 'x'" in capsys.readouterr().err
