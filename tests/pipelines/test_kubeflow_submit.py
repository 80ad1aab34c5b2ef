"""Submitting to Kubeflow, waiting and scheduling: the real kfp.Client against a faithful server over real HTTP."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from kfp_server import Frame, Refusal, login_page, serving
from starlette.responses import Response

from assay.components.contracts.errors import AssayError, RecipeError, RunError
from assay.components.contracts.recipe import Recipe
from assay.pipelines.engines.kubeflow import engine, follow, schedule, submit
from assay.pipelines.engines.kubeflow.client import Server
from assay.pipelines.engines.kubeflow.profile import Profile

RECIPE = Recipe(name="small", preference=None, rl=None)
SECRET = "eyJhbGciOiJSUzI1NiJ9.very-secret"
IMAGE = "registry.example.org/assay-{}@sha256:" + 64 * "a"
PROMOTED = {"gate": "SUCCEEDED", "register-model": "SUCCEEDED", "deploy-model": "SUCCEEDED", "hold-model": "SKIPPED"}
HELD = {"gate": "SUCCEEDED", "deploy-model": "SKIPPED", "hold-model": "SUCCEEDED"}


@pytest.fixture(autouse=True)
def nothing_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(submit.TRIGGER, raising=False)
    monkeypatch.setattr(follow, "PATIENCE_SECONDS", 0.3)


@pytest.fixture
def kfp():
    with serving() as fake:
        fake.tokens = {SECRET: {"team-a"}}
        yield fake


@pytest.fixture
def token(tmp_path) -> Path:
    path = tmp_path / "token"
    path.write_text(SECRET + "\n")
    return path


@pytest.fixture
def deploy(tmp_path, token):
    """Write a deploy profile; keywords replace its keys, None removes one."""

    def write(fake, **changes) -> Path:
        profile = {
            "host": fake if isinstance(fake, str) else fake.url,
            "namespace": "team-a",
            "auth": {"token_file": str(token)},
            "images": {role: IMAGE.format(role) for role in ("data", "train", "serve")},
            "volume": {"claim": "assay-home"},
            "poll_seconds": 0.02,
            **changes,
        }
        path = tmp_path / "deploy.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in profile.items() if value is not None}))
        return path

    return write


def run(path, wait=True, events=None):
    return engine.run(RECIPE, "", path, wait, (events if events is not None else []).append)


def test_a_run_is_submitted_with_its_definition_and_not_waited_for(kfp, deploy):
    outcome = run(deploy(kfp, service_account="trainer", pipeline_root="minio://bucket/root"), wait=False)
    (made,) = kfp.runs.values()
    (version,) = kfp.versions.values()
    (pipeline,) = kfp.pipelines.values()
    assert (outcome.state, outcome.run, outcome.url) == (
        "SUBMITTED",
        made.run_id,
        f"{kfp.url}/#/runs/details/{made.run_id}",
    )
    assert made.service_account == "trainer"
    assert made.runtime_config.pipeline_root == "minio://bucket/root"
    assert (pipeline.display_name, pipeline.namespace) == ("small", "team-a")
    executors = version.pipeline_spec["pipeline_spec"]["deploymentSpec"]["executors"]
    assert executors["exec-train-sft"]["container"]["image"] == IMAGE.format("train")
    assert kfp.asked == {}


def test_an_unchanged_definition_is_uploaded_once(kfp, deploy):
    path = deploy(kfp)
    run(path), run(path)
    assert kfp.log.count("POST /apis/v2beta1/pipelines/upload_version") == 1
    assert len(kfp.runs) == 2  # the first one had ended
    run(deploy(kfp, default={"env": {"NCCL_DEBUG": "INFO"}}))
    assert len(kfp.versions) == 2
    assert len(kfp.pipelines) == 1
    assert all(len(version.name) == 64 for version in kfp.versions.values())


def test_without_a_trigger_a_run_that_is_going_is_joined(kfp, deploy):
    kfp.script = [Frame("RUNNING")]
    path = deploy(kfp)
    first, second = run(path, wait=False), run(path, wait=False)
    assert first == second
    assert len(kfp.runs) == 1


@pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED"])
def test_the_same_trigger_is_one_run_whatever_became_of_it(kfp, deploy, monkeypatch, state):
    kfp.script = [Frame(state, PROMOTED)]
    path = deploy(kfp)
    monkeypatch.setenv(submit.TRIGGER, "build-17")
    first, second = run(path), run(path)
    assert first == second
    assert first.state == state
    assert len(kfp.runs) == 1
    monkeypatch.setenv(submit.TRIGGER, "build-18")
    assert run(path).run != first.run


def test_of_two_submissions_at_once_the_later_run_is_ended(kfp, deploy, monkeypatch):
    """The other process's run appears between our look and our creation."""
    monkeypatch.setenv(submit.TRIGGER, "build-17")
    path = deploy(kfp)
    first = run(path, wait=False)
    look = submit._runs
    answers = iter([[], None])
    monkeypatch.setattr(submit, "_runs", lambda *given: look(*given) if (answer := next(answers)) is None else answer)
    assert run(path, wait=False).run == first.run
    assert sorted(made.state for made in kfp.runs.values()) == ["CANCELED", "PENDING"]


def test_a_trigger_with_a_strange_name_is_refused(kfp, deploy, monkeypatch):
    monkeypatch.setenv(submit.TRIGGER, "a b\n")
    with pytest.raises(RecipeError, match="cannot name a trigger"):
        run(deploy(kfp))
    assert not kfp.runs


@pytest.mark.parametrize(
    ("frame", "state", "decision", "words"),
    [
        (Frame("SUCCEEDED", PROMOTED), "SUCCEEDED", "promote", ""),
        (Frame("SUCCEEDED", HELD), "SUCCEEDED", "hold", "stands in the gate's artifact"),
        (Frame("SUCCEEDED", {"gate": "SUCCEEDED"}), "SUCCEEDED", "", "neither branch"),
        (
            Frame("FAILED", {"train-sft": "FAILED", "evaluate": "SKIPPED"}, {"train-sft": "out of memory\ntrace"}),
            "FAILED",
            "",
            "train-sft failed: out of memory",
        ),
        (Frame("FAILED"), "FAILED", "", "does not say why"),
        (Frame("CANCELED"), "CANCELLED", "", "cancelled on the server"),
        (Frame("SKIPPED"), "CANCELLED", "", "skipped"),
    ],
)
def test_every_final_state_ends_the_wait(kfp, deploy, frame, state, decision, words):
    kfp.script = [Frame("PENDING"), Frame("RUNNING"), Frame("PAUSED"), frame]
    outcome = run(deploy(kfp))
    assert (outcome.state, outcome.decision) == (state, decision)
    assert words in outcome.message
    assert "\n" not in outcome.message


@pytest.fixture
def bucket(monkeypatch):
    """A bucket on a real S3 server."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    for name, value in {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="artifacts")
    yield boto3.resource("s3").Bucket("artifacts")
    server.stop()


@pytest.mark.parametrize(
    ("frame", "record", "decision", "reason"),
    [
        (HELD, {"decision": "inconclusive", "reason": "12 more examples would decide"}, "inconclusive", "12 more"),
        (HELD, {"decision": "hold", "reason": "worse by 0.04"}, "hold", "worse by 0.04"),
        (PROMOTED, {"decision": "promote", "reason": "better by 0.2"}, "promote", "better by 0.2"),
        (HELD, {"decision": "promote", "reason": "of another run"}, "hold", "stands in the gate's artifact"),
        (HELD, None, "hold", "stands in the gate's artifact"),
    ],
)
def test_the_decision_is_read_below_the_pipeline_root(kfp, deploy, bucket, frame, record, decision, reason):
    kfp.script = [Frame("RUNNING"), Frame("SUCCEEDED", frame)]
    path = deploy(kfp, pipeline_root="s3://artifacts/assay/")
    run_id = run(path, wait=False).run
    if record:
        key = f"assay/small/{run_id}/gate/7d0f-salt/decision/decision.json"
        bucket.put_object(Key=key, Body=json.dumps(record).encode())
    outcome = run(path)
    assert (outcome.run, outcome.decision) == (run_id, decision)
    assert reason in outcome.message


def test_a_run_that_is_cancelled_while_we_wait_ends_the_wait(kfp, deploy):
    kfp.script = [Frame("RUNNING"), Frame("CANCELING")]
    cancel = []

    def before(method, path):
        if method == "GET" and "/runs/" in path and len(cancel) < 4:
            cancel.append(path)
            if len(cancel) == 4:
                next(iter(kfp.runs.values())).state = "CANCELED"

    kfp.before = before
    assert run(deploy(kfp)).state == "CANCELLED"


def test_each_change_of_a_task_is_told_once(kfp, deploy):
    kfp.script = [
        Frame("RUNNING", {"root-driver": "SUCCEEDED", "generate-data": "RUNNING"}),
        Frame("RUNNING", {"generate-data": "SUCCEEDED", "train-sft": "RUNNING"}),
        Frame("RUNNING", {"generate-data": "SUCCEEDED", "train-sft": "RUNNING"}),
        Frame("FAILED", {"generate-data": "SUCCEEDED", "train-sft": "FAILED"}, {"train-sft": "no memory"}),
    ]
    events = []
    run(deploy(kfp), events=events)
    told = [(event.task, event.state, event.seconds) for event in events if event.kind == "task_state"]
    assert told[:4] == [
        ("generate-data", "RUNNING", 0.0),
        ("generate-data", "SUCCEEDED", 7.0),
        ("train-sft", "RUNNING", 0.0),
        ("train-sft", "FAILED", 7.0),
    ]
    assert {state for _, state, _ in told[4:]} == {"SKIPPED"}
    assert [events[0].kind, events[-1].kind, events[-1].state] == ["run_started", "run_finished", "FAILED"]
    assert len({task for task, *_ in told}) == len(events[0].tasks)


def test_a_server_that_is_away_for_a_while_is_waited_for(kfp, deploy):
    kfp.script = [Frame("RUNNING"), Frame("SUCCEEDED", PROMOTED)]
    failing = iter([False, True, True])

    def before(method, path):
        if "/runs/" in path and next(failing, False):
            raise Refusal(503, "upstream connect error")

    kfp.before = before
    events = []
    assert run(deploy(kfp), events=events).decision == "promote"
    assert [event.message for event in events if event.kind == "log"] == [
        "cannot read the run: upstream connect error (HTTP 503); asking again"
    ] * 2


def test_a_token_that_expires_while_waiting_says_that_the_run_goes_on(kfp, deploy, token):
    kfp.script = [Frame("RUNNING")]

    def before(method, path):
        if "/runs/" in path and sum(kfp.asked.values()) == 2:
            kfp.tokens = {}

    kfp.before = before
    with pytest.raises(RunError, match="while waiting for run .* has expired") as caught:
        run(deploy(kfp))
    assert f"renew the token in {token}; the run goes on, see {kfp.url}/#/runs/details/" in str(caught.value)


def test_a_token_renewed_in_its_file_is_used_from_then_on(kfp, deploy, token):
    kfp.script = [Frame("RUNNING"), Frame("RUNNING"), Frame("SUCCEEDED", PROMOTED)]

    def before(method, path):
        if "/runs/" in path and sum(kfp.asked.values()) == 1:
            token.write_text("another")
            kfp.tokens = {"another": {"team-a"}}
            kfp.before = lambda method, path: None
            raise Refusal(503, "being rotated")

    kfp.before = before
    assert run(deploy(kfp)).state == "SUCCEEDED"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"host": "http://no-such-host.invalid"}, "there is no host of this name"),
        ({"host": None}, "no host is given"),
        ({"auth": {"token_file": "nope"}}, "nope: cannot be read"),
        ({"auth": {"cookie_env": "ASSAY_TEST_NO_COOKIE"}}, "$ASSAY_TEST_NO_COOKIE: the variable of the session cookie"),
        ({"auth": None}, "the login was refused"),
        ({"namespace": "team-b"}, "this login may not list pipelines in namespace 'team-b'"),
        ({"namespace": None}, "names no namespace"),
    ],
)
def test_what_cannot_be_reached_or_is_refused_is_one_sentence(kfp, deploy, changes, words):
    with pytest.raises(AssayError) as caught:
        run(deploy(kfp, **changes))
    lines = str(caught.value).splitlines()
    assert words in lines[0]
    assert len(lines) == 2
    assert lines[1].startswith("  → ")
    assert not kfp.runs


def test_a_closed_port(deploy):
    with pytest.raises(RunError, match="the connection is refused"):
        run(deploy(f"http://127.0.0.1:{free_port()}"))


def test_a_login_page_is_no_server(kfp, deploy):
    kfp.before = login_page
    with pytest.raises(RunError, match="may be a login page"):
        run(deploy(kfp))


def test_a_server_without_users_wants_no_namespace(kfp, deploy):
    kfp.users = False
    with pytest.raises(RecipeError, match="leave namespace out"):
        run(deploy(kfp))
    assert run(deploy(kfp, namespace=None, auth=None)).state == "SUCCEEDED"
    assert {made.namespace for made in kfp.experiments.values()} == {None}


def test_a_session_cookie(kfp, deploy, monkeypatch):
    kfp.tokens, kfp.cookies = {}, {"authservice_session=abc": {"team-a"}}
    monkeypatch.setenv("SESSION", "authservice_session=abc")
    assert run(deploy(kfp, auth={"cookie_env": "SESSION"})).state == "SUCCEEDED"


def test_an_untrusted_certificate(deploy, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *names]
    done = subprocess.run([*command, "-keyout", key, "-out", certificate], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    with serving(ssl_certfile=str(certificate), ssl_keyfile=str(key)) as kfp:
        kfp.tokens = {SECRET: {"team-a"}}
        with pytest.raises(RunError, match="certificate is not trusted: its issuer is unknown"):
            run(deploy(kfp))
        assert run(deploy(kfp, ca_file=str(certificate))).state == "SUCCEEDED"


def test_nothing_is_submitted_that_would_not_run(kfp, deploy):
    with pytest.raises(RecipeError, match="the promotion ledger would end with its pod"):
        run(deploy(kfp, volume=None))
    assert kfp.log == []


def test_no_secret_is_printed_stored_or_sent(kfp, deploy, monkeypatch, capfd, caplog):
    caplog.set_level("DEBUG")
    kfp.script = [Frame("RUNNING"), Frame("FAILED", {"train-sft": "FAILED"})]
    events = []
    outcome = run(deploy(kfp), events=events)
    kfp.before = lambda method, path: Response(f'{{"message": "bad Bearer {SECRET}"}}', 400)
    with pytest.raises(RunError) as caught:
        run(deploy(kfp))
    printed = capfd.readouterr()
    stored = [str(entry.to_dict()) for entry in [*kfp.versions.values(), *kfp.runs.values()]]
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("assay", "root", "kfp"))]
    for text in [printed.out, printed.err, str(caught.value), repr(outcome), repr(events), *stored, *ours]:
        assert SECRET not in text
    assert printed.out == ""


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("0 2 * * *", "0 0 2 * * *"),
        ("30 0 2 * * MON-FRI", "30 0 2 * * MON-FRI"),
        ("*/15 8-18 1,15 * ?", "0 */15 8-18 1,15 * ?"),
    ],
)
def test_five_fields_become_six(given, wanted):
    assert schedule.cron(given) == wanted


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("0 2 * *", "has 4"),
        ("@daily", "has 1"),
        ("60 2 * * *", "no minute"),
        ("0 24 * * *", "no hour"),
        ("0 2 0 * *", "no day"),
        ("0 2 * 13 *", "no month"),
        ("0 2 * * 7", "no weekday"),
        ("0 5-2 * * *", "no hour"),
        ("*/0 2 * * *", "no minute"),
        ("0 2,, * * *", "no hour"),
        ("0 2 * * moonday", "no weekday"),
    ],
)
def test_what_is_no_schedule_is_named(given, words):
    with pytest.raises(RecipeError, match=words):
        schedule.cron(given)


def test_the_same_schedule_twice_is_one_and_a_changed_one_is_replaced(kfp, deploy):
    path = deploy(kfp)
    assert engine.schedule(RECIPE, "0 2 * * *", "", path).endswith(": created")
    (first,) = kfp.recurring
    assert engine.schedule(RECIPE, "0 0 2 * * *", "", path).endswith(": unchanged")
    assert [*kfp.recurring] == [first]
    assert engine.schedule(RECIPE, "0 3 * * *", "", path).endswith(": replaced")
    (second,) = kfp.recurring.values()
    assert second.recurring_run_id != first
    assert second.trigger.cron_schedule.cron == "0 0 3 * * *"
    assert (second.max_concurrency, second.no_catchup, second.mode) == ("1", True, "ENABLE")
    other = Recipe(name="small", preference=None, rl=None, seed=7)
    assert engine.schedule(other, "0 3 * * *", "", path).endswith(": replaced")
    assert len(kfp.recurring) == 1
    assert len(kfp.versions) == 2


def test_duplicates_that_somebody_made_are_cleared(kfp, deploy):
    path = deploy(kfp)
    engine.schedule(RECIPE, "0 2 * * *", "", path)
    (one,) = kfp.recurring.values()
    for number in range(120):  # more than a page
        copy = type(one)(**{**one.to_dict(), "recurring_run_id": f"copy-{number}", "trigger": one.trigger})
        copy.pipeline_version_reference, copy.runtime_config = one.pipeline_version_reference, one.runtime_config
        kfp.recurring[copy.recurring_run_id] = copy
    assert engine.schedule(RECIPE, "0 2 * * *", "", path).endswith(": cleared of duplicates")
    assert len(kfp.recurring) == 1


def test_a_disabled_schedule_is_enabled_again(kfp, deploy):
    path = deploy(kfp)
    engine.schedule(RECIPE, "0 2 * * *", "", path)
    next(iter(kfp.recurring.values())).mode = "DISABLE"
    assert engine.schedule(RECIPE, "0 2 * * *", "", path).endswith(": replaced")
    assert [entry.mode for entry in kfp.recurring.values()] == ["ENABLE"]


def test_the_fake_refuses_what_the_models_do_not_know(kfp, deploy):
    import httpx

    headers = {"Authorization": f"Bearer {SECRET}"}
    url = f"{kfp.url}/apis/v2beta1/experiments"
    answered = httpx.post(url, json={"displayName": "x", "namespace": "team-a"}, headers=headers)
    assert (answered.status_code, answered.json()["code"]) == (400, 3)
    assert httpx.get(url, params={"namespace": "team-a"}).status_code == 401


def test_the_server_is_asked_with_kfps_own_client(kfp, deploy):
    import kfp as package

    server = Server(Profile.load(deploy(kfp)))
    assert type(server.client) is package.Client
    assert os.environ["HOME"]
    assert not (Path(os.environ["HOME"]) / ".config").exists()  # it keeps no context of ours
