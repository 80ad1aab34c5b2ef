"""When a pipeline runs: at times, by EventBridge Scheduler. When new rows arrive: see `infra/aws/assay.yaml`.

Doing it twice changes nothing: a schedule has the pipeline's name. The service delivers at least once and starts a
pipeline without a token of ours, so in rare cases one moment starts two executions; the second one finds every step in
the cache, and the registry refuses the same promotion twice.
"""

import re
from collections.abc import Mapping
from typing import Any

from assay.components.contracts.errors import RecipeError

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


def _listed(parameters: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Name": name, "Value": value} for name, value in sorted(parameters.items())]


def _holds(known: Any, wanted: Any) -> bool:
    """Return whether what is there says all that is wanted; a service adds defaults of its own."""
    if isinstance(wanted, dict):
        return isinstance(known, dict) and all(_holds(known.get(key), value) for key, value in wanted.items())
    return bool(known == wanted)
