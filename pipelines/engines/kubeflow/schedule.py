"""Recurring runs: the same schedule asked for twice is one schedule.

The server lets any number of recurring runs share a name, so they are listed and compared, and only what differs is
replaced: the new one is there before the old one goes.
"""

from typing import Any

from assay.components.contracts.errors import RecipeError

from .client import Server
from .submit import Version, experiment, runtime_config

_FIELDS = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day", 1, 31, ()),
    ("month", 1, 12, ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")),
    ("weekday", 0, 6, ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")),
)


def cron(text: str) -> str:
    """Return a cron expression as the server wants it: six fields, seconds first.

    Args:
        text: Five fields (minute, hour, day, month, weekday) or six.

    Raises:
        RecipeError: A field is none.
    """
    fields = text.split()
    if len(fields) == 5:
        fields = ["0", *fields]
    if len(fields) != 6:
        raise RecipeError(
            f"a schedule has five fields, or six with seconds first; {text!r} has {len(text.split())}",
            where="--cron",
            fix="for example '0 2 * * *' for each night at two (UTC)",
        )
    for value, (name, low, high, words) in zip(fields, _FIELDS, strict=True):
        _check(value, name, low, high, words)
    return " ".join(fields)


def ensure(server: Server, name: str, expression: str, version: Version) -> str:
    """Make the recurring runs of a name be one, of this version and at these times; return what was done.

    Args:
        server: The server.
        name: Of the schedule.
        expression: Six fields.
        version: What runs.
    """
    api = server.client.recurring_runs
    experiment_id = experiment(server)
    wanted = _wanted(server, name, expression, version, experiment_id)
    there = server.listed(
        "list schedules",
        api.recurring_run_service_list_recurring_runs,
        "recurring_runs",
        name,
        experiment_id=experiment_id,
    )
    same = next((entry for entry in there if _told(entry) == _told(wanted)), None)
    if same is None:
        server.call("create the schedule", api.recurring_run_service_create_recurring_run, recurring_run=wanted)
    stale = [entry for entry in there if entry is not same]
    for entry in stale:
        server.call(
            "delete the old schedule",
            api.recurring_run_service_delete_recurring_run,
            recurring_run_id=entry.recurring_run_id,
        )
    if same is None:
        return "replaced" if stale else "created"
    return "cleared of duplicates" if stale else "unchanged"


def _wanted(server: Server, name: str, expression: str, version: Version, experiment_id: str) -> Any:
    import kfp_server_api as api

    return api.V2beta1RecurringRun(
        display_name=name,
        description=f"{version.name}, made by `assay schedule`",
        experiment_id=experiment_id,
        pipeline_version_reference=version.reference(),
        runtime_config=runtime_config(server),
        service_account=server.profile.service_account or None,
        trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=expression)),
        mode=api.RecurringRunMode.ENABLE,
        max_concurrency="1",  # two runs of one recipe would promote over each other
        no_catchup=True,  # a cluster that was down need not train for each night it missed
    )


def _told(entry: Any) -> tuple[Any, ...]:
    """Return what makes two recurring runs the same."""
    reference, config, trigger = entry.pipeline_version_reference, entry.runtime_config, entry.trigger
    return (
        reference and (reference.pipeline_id, reference.pipeline_version_id),
        (config and config.pipeline_root) or None,
        (config and config.parameters) or {},
        trigger and trigger.cron_schedule and trigger.cron_schedule.cron,
        entry.service_account or None,
        entry.mode,
        str(entry.max_concurrency),
        bool(entry.no_catchup),
    )


def _check(text: str, name: str, low: int, high: int, words: tuple[str, ...]) -> None:
    for part in text.split(","):
        span, slash, step = part.partition("/")
        bounds = [] if span in ("*", "?") else span.split("-")
        numbers = [low + words.index(bound.upper()) if bound.upper() in words else bound for bound in bounds]
        fits = all(str(number).isdigit() and low <= int(number) <= high for number in numbers)
        ordered = len(numbers) < 2 or (fits and int(numbers[0]) <= int(numbers[1]))
        stepped = not slash or (step.isdigit() and int(step) > 0)
        if not (fits and ordered and stepped and len(numbers) <= 2 and (bounds or span)):
            raise RecipeError(
                f"{text!r} is no {name} of a schedule",
                where="--cron",
                fix=f"wanted {low} to {high}, *, a-b, a,b or */n",
            )
