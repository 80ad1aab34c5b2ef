"""Putting a definition and its executions into an account, so that doing it twice does it once.

Task templates lie in S3 under their own digest. The pipeline is updated only when its definition or role differs. An
execution is named by what triggered it (`ASSAY_TRIGGER_ID`): the same trigger is one execution, whatever became of it.
Without a trigger, a second submission of the same definition joins an execution that is still going.
"""

import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay.components.contracts.artifacts import digest_of
from assay.components.contracts.recipe import Recipe
from assay.components.runtime import s3
from assay.pipelines.engines.local.events import Event
from assay.pipelines.engines.outcome import Outcome

from . import decision, follow
from . import schedule as schedules
from .aws import Account, Refused, talking
from .definition import planned

NAME = "sagemaker"

TRIGGER = "ASSAY_TRIGGER_ID"
INLINE_BYTES = 100_000
"""A larger definition is handed over as an object; the request itself takes 1 MiB."""
GOING = ("Executing", "Stopping")


@dataclass(frozen=True)
class Submission:
    """What is submitted: a translated pipeline, and where it goes."""

    name: str
    """Of the pipeline."""
    text: str
    """The definition's JSON."""
    templates: Mapping[str, bytes]
    """Task templates by the sha256 of their bytes."""
    root: str
    """S3 prefix of everything."""
    region: str
    role: str
    """ARN of the role that starts the jobs."""
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Digest of the definition, whatever its spaces."""
        return digest_of(json.loads(self.text))

    @property
    def account(self) -> Account:
        """Clients of its region."""
        return Account(self.region)


def run(recipe: Recipe, data: str, deploy: Path | None, wait: bool, on_event: Callable[[Event], None]) -> Outcome:
    """Submit a recipe's run, unless it is there already, and wait for its end if asked to.

    Args:
        recipe: What to run.
        data: URI of the user's rows, in S3; empty to let the task generate them.
        deploy: The deploy profile.
        wait: Whether to follow the run to its end.
        on_event: Told what happens while waiting.

    Raises:
        RecipeError: SageMaker cannot run it, or the profile is wrong; before anything is submitted.
        RunError: AWS cannot be reached, or refuses.
    """
    return execute(_submission(recipe, data, deploy), wait=wait, on_event=on_event)


def schedule(recipe: Recipe, cron: str, data: str, deploy: Path | None) -> str:
    """Make a recipe run at these times (UTC), and say in one line what is now scheduled.

    Args:
        recipe: What to run.
        cron: Five fields, as crontab writes them.
        data: As for `run`.
        deploy: The deploy profile; EventBridge Scheduler takes its `roles.pipeline`.

    Raises:
        RecipeError: As `run`, or the expression is none that EventBridge knows.
        RunError: AWS cannot be reached, or refuses.
    """
    schedules.expression(cron)  # before anything is submitted
    submission = _submission(recipe, data, deploy)
    account = submission.account
    arn, _ = ensure_pipeline(account, submission)
    return schedules.at_times(account, arn, submission.role, cron, {"data": data} if data else {})


def _submission(recipe: Recipe, data: str, deploy: Path | None) -> Submission:
    from . import engine  # which calls us

    profile = engine.profile_of(deploy)
    built = engine.build(recipe, data, profile)
    return Submission(
        built.name, built.wire, built.templates, profile.root, profile.region, profile.roles.pipeline, profile.tags
    )


def execute(
    submission: Submission,
    *,
    wait: bool,
    on_event: Callable[[Event], None],
    parameters: Mapping[str, str] | None = None,
    poll: float = follow.POLL_SECONDS,
) -> Outcome:
    """Submit an execution, unless it is there already, and wait for its end if asked to.

    Args:
        submission: What.
        wait: Whether to follow it to its end.
        on_event: Told what happens while waiting.
        parameters: Values of the pipeline's parameters.
        poll: Seconds between two questions.

    Raises:
        RunError: AWS cannot be reached, or refuses.
    """
    account = submission.account
    ensure_pipeline(account, submission)
    arn = start(account, submission, trigger_id(), parameters)
    run_id, place = arn.rpartition("/")[2], url(submission, arn)
    if not wait:
        return Outcome(NAME, run_id, "SUBMITTED", place)
    ended = follow.wait(account, arn, planned(json.loads(submission.text)), on_event, poll)
    if ended.state != "SUCCEEDED":
        return Outcome(NAME, run_id, ended.state, place, message=ended.reason or f"it ended as {ended.status}")
    return Outcome(NAME, run_id, ended.state, place, *decision.read(account, ended))


def upload_templates(account: Account, submission: Submission) -> int:
    """Upload the task templates that are not there yet, and return their number."""
    prefix = f"{submission.root}/tasks"
    bucket, folder = s3.split(prefix)
    with talking("upload the task templates", prefix):
        known = s3.objects(account.s3, prefix)
        missing = [digest for digest in sorted(submission.templates) if f"{digest}/task.json" not in known]
        for digest in missing:
            key = f"{folder}/{digest}/task.json"
            account.s3.put_object(Bucket=bucket, Key=key, Body=submission.templates[digest])
    return len(missing)


def ensure_pipeline(account: Account, submission: Submission) -> tuple[str, str]:
    """Create the pipeline, or update it when it differs.

    Returns:
        Its ARN; and `created`, `updated` or `unchanged`.
    """
    upload_templates(account, submission)
    known = _described(account, submission)
    if known and _holds(known, submission):
        return str(known["PipelineArn"]), "unchanged"
    request = {"PipelineName": submission.name, "RoleArn": submission.role, **_definition(account, submission)}
    if known:
        with talking("update the pipeline", submission.name):
            return str(account.sagemaker.update_pipeline(**request)["PipelineArn"]), "updated"
    tags = [{"Key": key, "Value": value} for key, value in sorted(submission.tags.items())]
    token = digest_of([submission.name, submission.digest, submission.role])
    with talking("create the pipeline", submission.name):
        made = account.sagemaker.create_pipeline(**request, ClientRequestToken=token, Tags=tags)
    return str(made["PipelineArn"]), "created"


def start(account: Account, submission: Submission, trigger: str, parameters: Mapping[str, str] | None = None) -> str:
    """Return the ARN of the execution: one that is there (see above), or a new one.

    Args:
        account: Where.
        submission: A pipeline that is there.
        trigger: Name of what triggered it; empty for none.
        parameters: Values of the pipeline's parameters.
    """
    given = dict(parameters or {})
    name = _execution_name(submission, trigger, given)
    known = _known(account, submission.name, name, going=not trigger)
    if known:
        return known
    once = trigger or uuid.uuid4().hex
    with talking("start the pipeline", submission.name):
        started = account.sagemaker.start_pipeline_execution(
            PipelineName=submission.name,
            PipelineExecutionDisplayName=name,
            PipelineParameters=[{"Name": key, "Value": value} for key, value in sorted(given.items())],
            ClientRequestToken=digest_of([submission.name, submission.digest, given, once]),
        )
    return str(started["PipelineExecutionArn"])


def trigger_id() -> str:
    """Return the name of what triggered this run; empty when nothing has one."""
    return os.environ.get(TRIGGER, "")


def url(submission: Submission, arn: str) -> str:
    """Return where a person can look at an execution."""
    host = f"https://{submission.region}.console.aws.amazon.com/sagemaker/home?region={submission.region}"
    return f"{host}#/pipelines/{submission.name}/executions/{arn.rpartition('/')[2]}"


def _execution_name(submission: Submission, trigger: str, parameters: Mapping[str, str]) -> str:
    """Return a display name that says which definition, data and trigger it is of; at most 82 characters."""
    what = digest_of([submission.digest, dict(parameters), trigger])
    return f"{'trigger' if trigger else 'run'}-{what[:40]}"


def _known(account: Account, pipeline: str, name: str, *, going: bool) -> str:
    """Return the oldest execution of a name, or an empty text; `going` leaves out those that have ended."""
    with talking("list the executions", pipeline):
        pages = account.sagemaker.get_paginator("list_pipeline_executions").paginate(PipelineName=pipeline)
        found = [
            entry
            for page in pages
            for entry in page.get("PipelineExecutionSummaries", ())
            if entry.get("PipelineExecutionDisplayName") == name
            and (not going or entry["PipelineExecutionStatus"] in GOING)
        ]
    first = min(found, key=lambda entry: entry["StartTime"], default=None)
    return str(first["PipelineExecutionArn"]) if first else ""


def _described(account: Account, submission: Submission) -> dict[str, Any] | None:
    try:
        with talking("describe the pipeline", submission.name):
            return dict(account.sagemaker.describe_pipeline(PipelineName=submission.name))
    except Refused as error:
        if error.missing:
            return None
        raise


def _holds(known: Mapping[str, Any], submission: Submission) -> bool:
    same = digest_of(json.loads(known["PipelineDefinition"])) == submission.digest
    return same and known.get("RoleArn") == submission.role


def _definition(account: Account, submission: Submission) -> dict[str, Any]:
    """Return the definition as a request takes it."""
    text = json.dumps(json.loads(submission.text), sort_keys=True, separators=(",", ":"))
    if len(text.encode()) <= INLINE_BYTES:
        return {"PipelineDefinition": text}
    bucket, key = s3.split(f"{submission.root}/definitions/{submission.digest}.json")
    with talking("upload the definition", submission.root):
        account.s3.put_object(Bucket=bucket, Key=key, Body=text.encode())
    return {"PipelineDefinitionS3Location": {"Bucket": bucket, "ObjectKey": key}}
