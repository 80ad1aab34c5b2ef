"""The local schedule: `schedule` notes it, `run_scheduler` runs in the foreground what is due.

    $ASSAY_HOME/schedules/NAME.json    one recipe, when, and with which rows; as it was when it was scheduled

Times are UTC, as on Kubeflow and in EventBridge, so no night is run twice or left out when the clocks change. A time
that passed while nothing ran is made up for once, with the latest one; the same planned time is one run, from however
many machines (`once.py`). cronsim reads the expressions: it has no dependencies, knows Debian's rules, and runs
healthchecks.io; APScheduler would bring a job store of its own beside ours.
"""

import shlex
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cronsim import CronSim, CronSimError
from pydantic import AwareDatetime, BaseModel, ConfigDict

from assay.components.contracts.artifacts import write_atomically
from assay.components.contracts.errors import RecipeError
from assay.components.contracts.recipe import Recipe
from assay.components.runtime.context import home

from .launch import Job
from .once import Trigger

PAUSE = 20.0
"""Seconds at most between two looks at the schedules."""
Fire = Callable[[Trigger, Job], None]


class Schedule(BaseModel):
    """A recipe with its times."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe
    cron: str
    data: str
    since: AwareDatetime
    """No earlier time is made up for."""

    def due(self, now: datetime) -> datetime | None:
        """Return the latest planned time after `since` and not after `now`, or None."""
        latest = next(CronSim(self.cron, now.replace(microsecond=1), reverse=True))
        return latest if latest > self.since else None

    def following(self, now: datetime) -> datetime:
        """Return the first planned time after `now`."""
        return next(CronSim(self.cron, now))


def schedule(recipe: Recipe, cron: str, data: str, deploy: Path | None = None) -> str:
    """Note a recipe's schedule in place of an older one, and say what is now scheduled.

    Args:
        recipe: Kept as it is; schedule it again after a change.
        cron: Five fields (or six, seconds first), in UTC.
        data: URI of the rows; empty to let the task generate them.
        deploy: A deploy profile is of no use here.

    Raises:
        RecipeError: The expression cannot be read, or a deploy profile was given.
    """
    if deploy is not None:
        raise RecipeError("the local engine has no deploy profile", where=str(deploy), fix="leave out --deploy")
    now = datetime.now(UTC)
    path, before = _path(recipe.name), _find(recipe.name)
    wanted = Schedule(recipe=recipe, cron=" ".join(check(cron).split()), data=data, since=now)
    if before is None or before.model_copy(update={"since": now}) != wanted:
        write_atomically(path, wanted.model_dump_json(indent=1) + "\n")
    following = wanted.following(now)
    return f"{recipe.name} is scheduled at {wanted.cron!r} (UTC); next at {following:%Y-%m-%d %H:%M:%S}"


def check(cron: str) -> str:
    """Return an expression that can be read and comes true some day.

    Raises:
        RecipeError: It cannot, or does not.
    """
    try:
        next(CronSim(cron, datetime.now(UTC)))
    except CronSimError as error:
        raise RecipeError(
            f"{cron!r} is no cron expression ({str(error).lower()})",
            fix="write minute hour day month weekday, for example '0 2 * * *' for every night at 2",
        ) from error
    except StopIteration:
        raise RecipeError(f"{cron!r} never comes true", fix="check day and month") from None
    return cron


def schedules() -> list[Schedule]:
    """Return every schedule of this home, by name."""
    paths = sorted((home() / "schedules").glob("*.json"))
    return [Schedule.model_validate_json(path.read_bytes()) for path in paths]


def run_due(fire: Fire, now: datetime) -> None:
    """Fire what is due."""
    for planned in schedules():
        moment = planned.due(now)
        if moment is not None:
            job = Job(planned.recipe, data=planned.data)
            fire(Trigger.of("schedule", moment.isoformat(), job), job)


def run_scheduler(fire: Fire, *, until: datetime | None = None) -> None:
    """Fire what is due, one run after the other, until the process is stopped (or a time has come).

    Args:
        fire: Runs a trigger's job; called again for the same trigger until the next one is due.
        until: For tests and for a shift that ends.
    """
    while until is None or datetime.now(UTC) < until:
        run_due(fire, datetime.now(UTC))
        now = datetime.now(UTC)
        nearest = min((planned.following(now) for planned in schedules()), default=None)
        wait = (nearest - now).total_seconds() if nearest else PAUSE
        time.sleep(min(max(wait, 0.05), PAUSE))


def printed(kind: Literal["systemd", "cron"]) -> str:
    """Return the lines that let this machine run the schedules without a terminal.

    systemd keeps the foreground scheduler alive; cron calls it at each schedule's own times.
    """
    program = str(Path(sys.executable).with_name("assay"))
    if kind == "cron":
        lines = ["CRON_TZ=UTC", f"ASSAY_HOME={home()}"]
        return "\n".join(lines + [f"{item.cron}  {shlex.quote(program)} trigger cron --due" for item in schedules()])
    return "\n".join(
        [
            "# ~/.config/systemd/user/assay-schedules.service; then: systemctl --user enable --now assay-schedules",
            "[Unit]",
            "Description=Assay: runs what is scheduled",
            "[Service]",
            f'Environment="ASSAY_HOME={home()}"',
            f'ExecStart="{program}" trigger cron',
            "Restart=always",
            "KillMode=mixed",
            "TimeoutStopSec=120",
            "[Install]",
            "WantedBy=default.target",
        ]
    )


def _path(name: str) -> Path:
    return home() / "schedules" / f"{name}.json"


def _find(name: str) -> Schedule | None:
    path = _path(name)
    return Schedule.model_validate_json(path.read_bytes()) if path.is_file() else None
