"""One trigger, one run: on every engine, from any number of machines, whatever is killed meanwhile.

    $ASSAY_REGISTRY/triggers/ID/0001.claim.json    who runs it, and for what
                                0001.end.json      the run that came of it, or why none did

A claim is an object that one caller can create. A claim without an end means that the run is under way, or that its
process died: then the next caller makes claim 2 and launches again. That gives the same run, because every engine
finds a trigger's run by the trigger's id (`launch.py`). What is written is never changed: it is the record of what ran.
"""

import os
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict

from assay.components.contracts.artifacts import digest_of, sha256_file
from assay.components.contracts.errors import AssayError, RunError
from assay.components.runtime.context import registry_address
from assay.components.shared.storage import Storage, open_storage

from ..engines.local.store import process_started
from ..engines.outcome import Outcome
from .launch import Job

Kind = Literal["schedule", "data", "ci"]
ENDED = ("SUCCEEDED", "FAILED")
"""States after which the same trigger starts nothing; a cancelled run is gone on with."""
PATIENCE = {"local": timedelta(days=1)}
"""When a claim from another machine, whose process cannot be asked, is taken for dead: by engine."""
SUBMITTING = timedelta(minutes=15)
"""The same where a claim is about a submission: the service runs on, and a second one joins its run."""


class Busy(RunError):
    """Somebody else runs the trigger, or it failed to launch a moment ago: there is nothing to do but to wait."""


class Part(BaseModel):
    """An object of a trigger's record."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def line(self) -> bytes:
        """Return it as it is stored."""
        return self.model_dump_json(indent=1).encode() + b"\n"


class Trigger(Part):
    """What happened, and what is to run because of it."""

    kind: Kind
    what: str
    """What makes it this one: the planned time, the digest of the new data, the commit."""
    recipe: str
    recipe_digest: str
    engine: str
    data: str
    deploy: str = ""
    """sha256 of the deploy profile."""

    @classmethod
    def of(cls, kind: Kind, what: str, job: Job) -> "Trigger":
        """Return the trigger that starts a job."""
        return cls(
            kind=kind,
            what=what,
            recipe=job.recipe.name,
            recipe_digest=digest_of(job.recipe.model_dump(mode="json")),
            engine=job.engine,
            data=job.data,
            deploy=sha256_file(job.deploy) if job.deploy else "",
        )

    @property
    def id(self) -> str:
        """Digest of all of it, 32 hex digits."""
        return digest_of(self.model_dump(mode="json"))[:32]


class Claim(Part):
    """Who runs a trigger."""

    trigger: Trigger
    number: int
    time: AwareDatetime
    host: str
    pid: int
    pid_started: float
    nonce: str
    """Makes each claim unlike any other."""

    def is_dead(self) -> bool:
        """Whether the process that made it is known, or after a long time taken, to be gone."""
        if self.host == socket.gethostname():
            return abs(process_started(self.pid) - self.pid_started) > 1.0
        return datetime.now(UTC) - self.time > PATIENCE.get(self.trigger.engine, SUBMITTING)


class End(Part):
    """What came of a claim."""

    time: AwareDatetime
    outcome: Outcome | None = None
    error: str = ""
    """Why nothing was launched."""


@dataclass(frozen=True)
class Record:
    """The last attempt at a trigger."""

    claim: Claim
    end: End | None

    @property
    def outcome(self) -> Outcome | None:
        """The run that the trigger came to; None while there is none."""
        return self.end.outcome if self.end else None

    @property
    def state(self) -> str:
        """`RUNNING`, `DEAD`, `ERROR` (nothing was launched), or the run's state."""
        if self.end is None:
            return "DEAD" if self.claim.is_dead() else "RUNNING"
        return self.end.outcome.state if self.end.outcome else "ERROR"


def once(
    trigger: Trigger, launch: Callable[[], Outcome], *, wait: bool = True, pause: timedelta = timedelta()
) -> tuple[Record, bool]:
    """Launch a trigger's run unless it was launched before; return its record, and whether it was launched now.

    Args:
        trigger: What happened.
        launch: Starts the run, or goes on with the one that a dead process started.
        wait: Whether to follow a run to its end that was only submitted before.
        pause: How long not to try again after a launch that failed.

    Raises:
        AssayError: What `launch` raised; the next call tries again.
        Busy: Somebody else runs it just now, or the pause is not over.
    """
    storage = open_storage(registry_address())
    before = find(storage, trigger.id)
    if before and (before.state in ENDED or (before.state == "SUBMITTED" and not wait)):
        return before, False
    _refuse_busy(before, pause)
    claim = _claim(storage, trigger, before.claim.number + 1 if before else 1)
    if claim is None:  # somebody else was faster: see how far it is
        return once(trigger, launch, wait=wait, pause=pause)
    try:
        outcome = launch()
    except AssayError as error:
        _end(storage, claim, End(time=datetime.now(UTC), error=str(error)))
        raise
    return Record(claim, _end(storage, claim, End(time=datetime.now(UTC), outcome=outcome))), True


def find(storage: Storage, trigger: str) -> Record | None:
    """Return the last attempt at a trigger, or None."""
    claims = [key for key in storage.keys(f"triggers/{trigger}") if key.endswith(".claim.json")]
    return _read(storage, claims[-1]) if claims else None


def records() -> list[Record]:
    """Return the last attempt at every trigger, newest first."""
    storage = open_storage(registry_address())
    last = {key.rpartition("/")[0]: key for key in storage.keys("triggers") if key.endswith(".claim.json")}
    found = [_read(storage, key) for key in last.values()]
    return sorted(found, key=lambda record: record.claim.time, reverse=True)


def _read(storage: Storage, key: str) -> Record:
    claim = Claim.model_validate_json(storage.read(key) or b"")
    end = storage.read(key.replace(".claim.", ".end."))
    return Record(claim, End.model_validate_json(end) if end else None)


def _claim(storage: Storage, trigger: Trigger, number: int) -> Claim | None:
    claim = Claim(
        trigger=trigger,
        number=number,
        time=datetime.now(UTC),
        host=socket.gethostname(),
        pid=os.getpid(),
        pid_started=process_started(os.getpid()),
        nonce=uuid.uuid4().hex,
    )
    won = storage.create(f"triggers/{trigger.id}/{number:04d}.claim.json", claim.line())
    return claim if won else None


def _end(storage: Storage, claim: Claim, end: End) -> End:
    storage.create(f"triggers/{claim.trigger.id}/{claim.number:04d}.end.json", end.line())
    return end


def _refuse_busy(record: Record | None, pause: timedelta) -> None:
    if record is None:
        return
    claim, end = record.claim, record.end
    if record.state == "RUNNING":
        raise Busy(
            "this trigger's run is under way",
            where=f"{claim.host}, process {claim.pid}, since {claim.time:%Y-%m-%d %H:%M} UTC",
            fix="wait for it; if that machine is gone, the trigger is free a day later (15 minutes for a submission)",
        )
    if end and end.error and datetime.now(UTC) - end.time < pause:
        raise Busy(f"the last launch failed: {end.error}", where=claim.host, fix="it is tried again by itself")
