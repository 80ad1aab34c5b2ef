"""When a pipeline runs: at times (EventBridge Scheduler), or when new rows arrive (S3 → EventBridge).

Doing it twice changes nothing: a schedule and a rule have the pipeline's name. Both services deliver at least once and
start a pipeline without a token of ours, so in rare cases one moment starts two executions; the second one finds every
step in the cache, and the registry refuses the same promotion twice.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from assay.components.contracts.errors import RecipeError
from assay.components.runtime import s3

from .aws import Account, Refused, talking

GROUP = "default"
_DAYS = {str(number): str(number % 7 + 1) for number in range(8)}
"""Day of the week: cron's 0 to 7 from Sunday → EventBridge's 1 to 7 from Sunday."""


def at_times(account: Account, pipeline: str, role: str, cron: str, parameters: Mapping[str, str]) -> str:
    """Make a pipeline run at these times (UTC); return one line that says so.

    Args:
        account: Where.
        pipeline: Its ARN.
        role: That EventBridge Scheduler takes; it must trust `scheduler.amazonaws.com` and may start the pipeline.
        cron: Five fields, as crontab writes them.
        parameters: Values of the pipeline's parameters.

    Raises:
        RecipeError: The expression is none that EventBridge knows.
        RunError: AWS refuses.
    """
    name = pipeline.rpartition("/")[2]
    wanted = {
        "Name": name,
        "GroupName": GROUP,
        "ScheduleExpression": expression(cron),
        "ScheduleExpressionTimezone": "UTC",
        "FlexibleTimeWindow": {"Mode": "OFF"},
        "State": "ENABLED",
        "Target": {
            "Arn": pipeline,
            "RoleArn": role,
            "SageMakerPipelineParameters": {"PipelineParameterList": _listed(parameters)},
        },
    }
    known = _schedule(account, name)
    if known is not None and all(_holds(known.get(key), value) for key, value in wanted.items()):
        done = "unchanged"
    elif known is not None:
        with talking("change the schedule", name):
            account.scheduler.update_schedule(**wanted)
        done = "changed"
    else:
        with talking("make the schedule", name):
            account.scheduler.create_schedule(**wanted)
        done = "made"
    return f"{name} runs at {wanted['ScheduleExpression']} UTC: schedule {done}"


def on_new_data(
    account: Account, pipeline: str, role: str, watched: str, parameters: Mapping[str, str], marker: str = ""
) -> str:
    """Make a pipeline run when an object is written below a prefix; return one line that says so.

    Args:
        account: Where.
        pipeline: Its ARN.
        role: That EventBridge takes; it must trust `events.amazonaws.com` and may start the pipeline.
        watched: S3 prefix.
        parameters: Values of the pipeline's parameters, for example the prefix as `data`.
        marker: Name of the object that says a delivery is complete, for example `_SUCCESS`; without one, every object
            of a delivery starts an execution.

    Raises:
        RunError: AWS refuses.
    """
    name = f"{pipeline.rpartition('/')[2]}-new-data"
    bucket, prefix = s3.split(watched)
    _notify(account, bucket, watched)
    key = {"wildcard": f"{prefix}/*{marker}"} if marker else {"prefix": f"{prefix}/"}
    pattern = {
        "source": ["aws.s3"],
        "detail-type": ["Object Created"],
        "detail": {"bucket": {"name": [bucket]}, "object": {"key": [key]}},
    }
    target = {
        "Id": "pipeline",
        "Arn": pipeline,
        "RoleArn": role,
        "SageMakerPipelineParameters": {"PipelineParameterList": _listed(parameters)},
    }
    with talking("make the rule for new data", name):  # both calls set the whole, so they may be repeated
        account.events.put_rule(Name=name, EventPattern=json.dumps(pattern, sort_keys=True), State="ENABLED")
        answer = account.events.put_targets(Rule=name, Targets=[target])
    if answer.get("FailedEntryCount"):
        raise RecipeError(str(answer["FailedEntries"][0].get("ErrorMessage")), where=name, fix="correct the role")
    return f"{pipeline.rpartition('/')[2]} runs when {marker or 'an object'} is written below {watched}: rule {name}"


def expression(cron: str) -> str:
    """Return a crontab line's five fields as EventBridge writes them.

    Raises:
        RecipeError: It is not one that EventBridge can keep.
    """
    fields = cron.split()
    if len(fields) != 5 or not all(re.fullmatch(r"[0-9A-Za-z*,/\-]+", part) for part in fields):
        raise RecipeError(
            f"{cron!r} is not a cron expression of five fields", where="cron", fix="write for example '0 3 * * 1'"
        )
    minute, hour, day, month, weekday = fields
    if day != "*" and weekday != "*":
        raise RecipeError(
            "EventBridge takes a day of the month or a day of the week, not both",
            where=f"cron {cron!r}",
            fix="leave one of them *",
        )
    weekday = "?" if weekday == "*" else re.sub(r"(?<![/\d])\d\b", lambda match: _DAYS.get(match[0], "8"), weekday)
    if "8" in weekday:
        raise RecipeError("a day of the week is 0 to 7", where=f"cron {cron!r}", fix="0 and 7 are Sunday")
    return f"cron({minute} {hour} {'?' if weekday != '?' else day} {month} {weekday} *)"


def _schedule(account: Account, name: str) -> dict[str, Any] | None:
    try:
        with talking("read the schedule", name):
            return dict(account.scheduler.get_schedule(Name=name, GroupName=GROUP))
    except Refused as error:
        if error.missing:
            return None
        raise


def _notify(account: Account, bucket: str, watched: str) -> None:
    """Let a bucket tell EventBridge of its objects, and keep whom else it tells."""
    with talking("read the bucket's notifications", watched):
        known = account.s3.get_bucket_notification_configuration(Bucket=bucket)
    known.pop("ResponseMetadata", None)
    if "EventBridgeConfiguration" in known:
        return
    with talking("switch on the bucket's events", watched):
        account.s3.put_bucket_notification_configuration(
            Bucket=bucket, NotificationConfiguration={**known, "EventBridgeConfiguration": {}}
        )


def _listed(parameters: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Name": name, "Value": value} for name, value in sorted(parameters.items())]


def _holds(known: Any, wanted: Any) -> bool:
    """Return whether what is there says all that is wanted; a service adds defaults of its own."""
    if isinstance(wanted, dict):
        return isinstance(known, dict) and all(_holds(known.get(key), value) for key, value in wanted.items())
    return bool(known == wanted)
