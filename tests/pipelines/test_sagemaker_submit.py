"""Submitting to SageMaker: over HTTP, to moto's server and the emulator before it, and to servers that refuse."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from botocore.validate import ParamValidator
from click.testing import Result
from typer.testing import CliRunner

from assay.components.contracts.errors import AssayError, RecipeError, RunError
from assay.components.runtime import s3
from assay.components.shared import registry
from assay.pipelines.cli import app
from assay.pipelines.engines.sagemaker import packages, schedule, submit
from assay.pipelines.engines.sagemaker.aws import Account
from assay.pipelines.engines.sagemaker.emulate import Emulator
from assay.pipelines.engines.sagemaker.emulation.aws import local_aws
from assay.pipelines.engines.sagemaker.emulation.service import Service
from assay.pipelines.engines.sagemaker.submit import Submission
from fixtures import aws, clouds
from fixtures.attempts import Attempt
from fixtures.definitions import ROLE, Book, condition, equals, get, output, parameter

GATE = """
import json
import time
from pathlib import Path

from kfp.dsl import Artifact, Output

from assay.components.contracts.errors import DataError


def gate(word: str, decision: Output[Artifact]) -> bool:
    if word == "broken":
        raise DataError("two rows are bad", where="rows.jsonl:3", fix="correct them")
    while word.startswith("/") and not Path(word).exists():
        time.sleep(0.05)
    Path(decision.path).mkdir(parents=True)
    (Path(decision.path) / "decision.json").write_text(json.dumps({"decision": word, "reason": f"because {word}"}))
    return word == "promote"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """moto's server with the emulator before it: an execution really runs."""
    folder = tmp_path_factory.mktemp("service")
    (folder / "my_gate.py").write_text(GATE)
    paths = [str(folder), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    inside = {"PYTHONPATH": os.pathsep.join(paths), "JOURNAL": str(folder / "journal"), "OMP_NUM_THREADS": "1"}
    services = []

    def before(backend, environment):
        made = Service(backend, lambda: Emulator(folder / "home", environment, environment=inside, containers=False))
        services.append(made)
        return made

    with local_aws(aws.REGION, before) as environment:
        yield environment
        services[0].join()


@pytest.fixture
def account(server, monkeypatch):
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(submit.TRIGGER, raising=False)
    return Account(aws.REGION)


@pytest.fixture
def submission(account, tmp_path, request):
    """A pipeline of a gate whose word is a parameter, and one branch after it."""
    book = Book(f"s3://{aws.bucket(account.s3)}/assay", tmp_path / "tasks")
    gate = book.processing(
        "gate",
        "my_gate:gate",
        given={"word": ("STRING", get("Parameters.word"))},
        outputs={"decision": "system.Artifact"},
        params={"Output": "BOOLEAN"},
        CacheConfig={"Enabled": True, "ExpireAfter": "P30D"},
    )
    held = book.processing(
        "hold", "optional", artifacts={"data": output("gate", "decision")}, params={"Output": "STRING"}
    )
    definition = book.definition(
        condition("decided", equals(parameter("gate"), True), [], [held]),
        gate,
        parameters=[{"Name": "word", "Type": "String", "DefaultValue": "promote"}],
    )
    templates = {path.parent.name: path.read_bytes() for path in book.folder.glob("*/task.json")}
    name = "p-" + "".join(letter for letter in request.node.name if letter.isalnum())[:40]
    return Submission(name, json.dumps(definition), templates, book.root, aws.REGION, ROLE, {"team": "nlp"})


def run(submission, **more):
    events = []
    outcome = submit.execute(submission, wait=True, on_event=events.append, poll=0.2, **more)
    return outcome, [(event.task, event.state) for event in events if event.kind == "task_state"]


def test_a_run_is_submitted_followed_and_decided(submission, account):
    outcome, told = run(submission)
    assert (outcome.state, outcome.decision, outcome.message) == ("SUCCEEDED", "promote", "because promote"), outcome
    assert outcome.url.endswith(f"#/pipelines/{submission.name}/executions/{outcome.run}")
    assert told[-1] == ("hold", "SKIPPED")
    assert {("gate", "SUCCEEDED"), ("decided", "SUCCEEDED")} <= set(told)
    tags = account.sagemaker.list_tags(ResourceArn=submit.ensure_pipeline(account, submission)[0])["Tags"]
    assert tags == [{"Key": "team", "Value": "nlp"}]


def test_a_hold_is_a_success_with_its_reason_and_comes_from_the_cache_the_second_time(submission):
    given = {"parameters": {"word": "inconclusive"}}
    first, told = run(submission, **given)
    again, told_again = run(submission, **given)
    for outcome in (first, again):
        assert (outcome.state, outcome.decision, outcome.message) == (
            "SUCCEEDED",
            "inconclusive",
            "because inconclusive",
        )
    assert first.run != again.run  # without a trigger, and the first had ended
    assert ("gate", "SUCCEEDED") in told
    assert ("hold", "SUCCEEDED") in told
    assert ("gate", "CACHED") in told_again


def test_a_broken_step_is_told_in_its_own_words(submission):
    outcome, told = run(submission, parameters={"word": "broken"})
    assert (outcome.state, outcome.decision) == ("FAILED", "")
    assert "gate failed: AlgorithmError: rows.jsonl:3: two rows are bad" in outcome.message
    assert ("gate", "FAILED") in told


def test_the_same_trigger_twice_is_one_execution_and_another_one_is_another(submission, monkeypatch):
    monkeypatch.setenv(submit.TRIGGER, "build 17")
    first, _ = run(submission)
    second, _ = run(submission)
    monkeypatch.setenv(submit.TRIGGER, "build 18")
    third, _ = run(submission)
    assert first.run == second.run != third.run
    assert [outcome.state for outcome in (first, second, third)] == ["SUCCEEDED"] * 3


def test_without_waiting_it_says_that_it_was_submitted_and_a_second_one_joins(submission, tmp_path):
    go_on = tmp_path / "go on"  # until it is there, the first one is going
    quiet = {"wait": False, "on_event": lambda event: None, "parameters": {"word": str(go_on)}}
    try:
        first, second = submit.execute(submission, **quiet), submit.execute(submission, **quiet)
    finally:
        go_on.touch()
    assert first.state == second.state == "SUBMITTED"
    assert first.run == second.run
    assert run(submission)[0].state == "SUCCEEDED"


def test_a_pipeline_is_updated_only_when_it_differs_and_templates_are_uploaded_once(submission, account):
    assert submit.upload_templates(account, submission) == len(submission.templates) == 2
    assert submit.upload_templates(account, submission) == 0
    assert submit.ensure_pipeline(account, submission)[1] == "created"
    assert submit.ensure_pipeline(account, submission)[1] == "unchanged"
    spaced = Submission(**{**vars(submission), "text": json.dumps(json.loads(submission.text), indent=3)})
    assert submit.ensure_pipeline(account, spaced)[1] == "unchanged"
    other = {**json.loads(submission.text), "Metadata": {"a": "b"}}
    changed = Submission(**{**vars(submission), "text": json.dumps(other)})
    assert submit.ensure_pipeline(account, changed)[1] == "updated"
    stored = account.sagemaker.describe_pipeline(PipelineName=submission.name)["PipelineDefinition"]
    assert json.loads(stored) == other
    elsewhere = Submission(**{**vars(changed), "role": f"{ROLE}-2"})
    assert submit.ensure_pipeline(account, elsewhere)[1] == "updated"


def test_a_large_definition_is_handed_over_as_an_object(submission, account):
    large = {**json.loads(submission.text), "Metadata": {"a": "b" * 100_000}}
    big = Submission(**{**vars(submission), "text": json.dumps(large)})
    assert submit.ensure_pipeline(account, big)[1] == "created"
    bucket, prefix = s3.split(f"{big.root}/definitions")
    (key,) = [entry["Key"] for entry in account.s3.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]]
    assert key == f"{prefix}/{big.digest}.json"
    assert json.loads(account.s3.get_object(Bucket=bucket, Key=key)["Body"].read()) == large


PIPELINE = "arn:aws:sagemaker:eu-west-1:123456789012:pipeline/lamps"


def test_a_schedule_is_made_once_and_changed_when_it_differs(account):
    def made(cron="0 3 * * 1", data="s3://rows/new"):
        return schedule.at_times(account, PIPELINE, ROLE, cron, {"data": data})

    assert made() == "lamps runs at cron(0 3 ? * 2 *) UTC: schedule made"
    assert made().endswith("unchanged")
    assert made(data="s3://rows/other").endswith("changed")
    (entry,) = account.scheduler.list_schedules()["Schedules"]
    target = account.scheduler.get_schedule(Name=entry["Name"])["Target"]
    assert target["Arn"] == PIPELINE
    assert target["SageMakerPipelineParameters"] == {
        "PipelineParameterList": [{"Name": "data", "Value": "s3://rows/other"}]
    }


@pytest.mark.parametrize(
    ("cron", "expected"),
    [
        ("0 3 * * *", "cron(0 3 * * ? *)"),
        ("*/15 8-18 * * 1-5", "cron(*/15 8-18 ? * 2-6 *)"),
        ("0 0 1 */3 *", "cron(0 0 1 */3 ? *)"),
        ("30 4 * * 0,6", "cron(30 4 ? * 1,7 *)"),
        ("30 4 * * 7", "cron(30 4 ? * 1 *)"),
        ("30 4 * * MON", "cron(30 4 ? * MON *)"),
    ],
)
def test_cron_is_written_as_eventbridge_counts(cron, expected):
    assert schedule.expression(cron) == expected


@pytest.mark.parametrize("cron", ["daily", "0 3 * *", "0 3 1 * 1", "0 3 * * 9", "0 3 * * $(x)"])
def test_what_eventbridge_cannot_keep_is_refused(cron):
    with pytest.raises(RecipeError):
        schedule.expression(cron)


def version(**changes) -> packages.Version:
    lineage = {"data": "d" * 64, "recipe": "r" * 64, "content": "c" * 64}
    given = {
        "name": "lamps",
        "number": 3,
        "content": "c" * 64,
        "decision": "e" * 64,
        "reason": "better on 40 of 50",
        "model": "s3://bucket/models/c",
        "image": "123456789012.dkr.ecr.eu-west-1.amazonaws.com/assay-serve@sha256:" + "0" * 64,
        "lineage": lineage,
    }
    return packages.Version(**{**given, **changes})


def test_a_version_is_mirrored_once_pending_approval_with_its_lineage(account):
    first = packages.mirror(account, version())
    assert packages.mirror(account, version()) == first
    assert packages.mirror(account, version(number=4, content="f" * 64)) != first
    told = account.sagemaker.describe_model_package(ModelPackageName=first)
    assert told["ModelApprovalStatus"] == "PendingManualApproval"
    assert told["CustomerMetadataProperties"] == {
        "assay.content": "c" * 64,
        "assay.data": "d" * 64,
        "assay.decision": "e" * 64,
        "assay.recipe": "r" * 64,
        "assay.version": "3",
    }


def test_the_command_mirrors_the_champion_of_the_profiles_registry(account, tmp_path, monkeypatch):
    bucket, image = aws.bucket(account.s3), version().image
    where = {"registry": f"s3://{bucket}/registry", "mlflow_tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}
    for name, value in zip(("ASSAY_REGISTRY", "MLFLOW_TRACKING_URI"), where.values(), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    profile = tmp_path / "deploy.yaml"

    def mirror(**settings) -> Result:
        profile.write_text(yaml.safe_dump({**clouds.PROFILE, "region": aws.REGION, **settings}))
        return CliRunner().invoke(app, ["mirror", "lamps-of-ours", "--deploy", str(profile)])

    for settings, words in [({}, "the registry is not there"), ({"registry": where["registry"]}, "names the image")]:
        refused = mirror(**settings).exception
        assert isinstance(refused, RecipeError)
        assert words in str(refused)
    attempt = Attempt(tmp_path, "weights")
    attempt.register("lamps-of-ours")
    everything = {**where, "images": {"serve": image}}
    assert "has no champion" in str(mirror(**everything).exception)
    registry.promote("lamps-of-ours", 1)
    arn = mirror(**everything).stdout.strip()
    assert mirror(**everything).stdout.strip() == arn
    told = account.sagemaker.describe_model_package(ModelPackageName=arn)
    assert told["ModelApprovalStatus"] == "PendingManualApproval"
    assert told["CustomerMetadataProperties"]["assay.content"] == attempt.content
    assert told["CustomerMetadataProperties"]["assay.decision"] == registry.history("lamps-of-ours")[0].decision
    (container,) = told["InferenceSpecification"]["Containers"]
    place = container["ModelDataSource"]["S3DataSource"]["S3Uri"]
    assert container["Image"] == image
    assert "model.safetensors" in s3.objects(account.s3, place)


def test_requests_fit_the_services_model(account):
    request = packages.request_of(version(reason="x" * 2000))
    shape = account.sagemaker.meta.service_model.operation_model("CreateModelPackage").input_shape
    assert not ParamValidator().validate(request, shape).has_errors()
    assert len(request["ModelPackageDescription"]) <= shape.members["ModelPackageDescription"].metadata["max"]


# --- whatever stands in the way ---------------------------------------------------------------------------------------


class Refusing(BaseHTTPRequestHandler):
    """Answers everything with one error, in JSON as SageMaker does and in XML as S3 does."""

    code, text = "", ""

    def do_POST(self):
        body = json.dumps({"__type": self.code, "message": self.text}).encode()
        self._answer(body, "application/x-amz-json-1.1")

    def do_GET(self):
        body = f"<Error><Code>{self.code}</Code><Message>{self.text}</Message></Error>".encode()
        self._answer(body, "application/xml")

    do_PUT = do_GET

    def _answer(self, body: bytes, kind: str) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(403 if "Denied" in self.code else 404 if "NoSuch" in self.code else 400)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def refusing(monkeypatch):
    """An account whose every answer is one error."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAABCDEFGHIJKLMNOP")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")

    def answer(code: str, text: str = "") -> Account:
        Refusing.code, Refusing.text = code, text
        return Account(aws.REGION)

    yield answer
    server.shutdown()
    server.server_close()


def plain(**changes) -> Submission:
    given = {"name": "lamps", "text": '{"Steps": []}', "templates": {"0": b"{}"}, "root": "s3://bucket/assay"}
    return Submission(**{**given, "region": aws.REGION, "role": ROLE, **changes})


def refused(call, *arguments) -> str:
    with pytest.raises(AssayError) as caught:
        call(*arguments)
    said = str(caught.value)
    assert "wJalr" not in said
    assert "AKIA" not in said
    assert caught.value.fix
    assert len(caught.value.what.splitlines()) == 1
    return said


@pytest.mark.parametrize(
    ("code", "text", "said"),
    [
        ("ExpiredTokenException", "The security token included in the request is expired", "the AWS login has expired"),
        ("UnrecognizedClientException", "The security token is invalid", "AWS does not know these credentials"),
        (
            "AccessDeniedException",
            "User: u is not authorized to perform: iam:PassRole on resource: r",
            "allow iam:PassRole on the role of the profile",
        ),
        ("AccessDeniedException", "User: u is not authorized", "allow StartPipelineExecution to this user"),
        ("ValidationException", "Could not assume role arn:aws:iam::1:role/x", "the role must exist and trust"),
        ("ThrottlingException", "Rate exceeded", "try again later"),
    ],
)
def test_what_sagemaker_refuses_is_one_sentence_with_what_to_do(refusing, code, text, said):
    account = refusing(code, text)

    def start():
        from assay.pipelines.engines.sagemaker.aws import talking

        with talking("start the pipeline", "lamps"):
            account.sagemaker.start_pipeline_execution(PipelineName="lamps", ClientRequestToken="x" * 32)

    assert said in refused(start)


@pytest.mark.parametrize(
    ("code", "said"),
    [("AccessDenied", "access to the bucket is denied"), ("NoSuchBucket", "there is no such bucket")],
)
def test_a_denied_or_missing_bucket_is_named(refusing, code, said):
    words = refused(submit.upload_templates, refusing(code), plain())
    assert said in words
    assert "s3://bucket/assay/tasks" in words


def test_no_credentials_no_region_and_no_answer_are_told_apart(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "there are no AWS credentials" in refused(submit.ensure_pipeline, Account(aws.REGION), plain())
    assert "no AWS region is set" in refused(lambda: Account("").sagemaker)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAABCDEFGHIJKLMNOP")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert "http://127.0.0.1:1" in (said := refused(submit.ensure_pipeline, Account(aws.REGION), plain()))
    assert "cannot be reached" in said
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    assert "no-such-profile" in refused(lambda: Account(aws.REGION).s3)


def test_waiting_ends_when_aws_refuses_and_says_that_the_execution_goes_on(refusing):
    from assay.pipelines.engines.sagemaker import follow

    with pytest.raises(RunError, match="the execution itself goes on"):
        follow.wait(refusing("AccessDeniedException", "no"), f"{PIPELINE}/execution/x", (), lambda event: None, 0.01)
