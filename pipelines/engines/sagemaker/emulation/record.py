"""What is known of an execution: every step's state, times and reason, kept in a file that a retry reads.

Threads of steps wait here for the steps before them.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from assay.components.contracts.artifacts import write_atomically
from assay.components.contracts.errors import RunError
from assay.pipelines.engines.local.events import Event

StepState = Literal["Waiting", "Executing", "Succeeded", "Failed", "Stopped", "NotStarted"]
ExecutionState = Literal["Executing", "Succeeded", "Failed", "Stopped", "CompletedWithFailures"]
ENDED = ("Succeeded", "Failed", "Stopped", "NotStarted")
EVENT_STATES = {
    "Executing": "RUNNING",
    "Succeeded": "SUCCEEDED",
    "Failed": "FAILED",
    "Stopped": "CANCELLED",
    "NotStarted": "SKIPPED",
}
"""A step's state in the service → in our events."""


class StepRecord(BaseModel):
    """What became of one step; a round of a loop is called `step[2]`."""

    name: str
    kind: str
    state: StepState = "Waiting"
    started: float = 0.0
    """Seconds since 1970; 0 when it never started."""
    finished: float = 0.0
    reason: str = ""
    attempts: int = 0
    cached: bool = False
    """Whether it took the outputs of an earlier execution."""
    cache_key: str = ""
    """Digest of what the service's cache looks at; empty when the step's cache is off."""
    properties: dict[str, Any] = {}
    """What `Get Steps.NAME…` reads: the answer of the service's Describe call."""
    jobs: list[str] = []
    """Names of the jobs, one per attempt."""


class Execution(BaseModel):
    """One execution of a definition."""

    id: str
    pipeline: str
    state: ExecutionState = "Executing"
    reason: str = ""
    parameters: dict[str, str | int | float | bool] = {}
    started: float
    finished: float = 0.0
    steps: dict[str, StepRecord] = {}

    def ran(self) -> list[str]:
        """Return the names of the steps that started a job, in the order of their beginning."""
        found = [step for step in self.steps.values() if step.jobs]
        return [step.name for step in sorted(found, key=lambda step: step.started)]


class Board:
    """An execution that many threads write; each change is told and kept."""

    def __init__(self, execution: Execution, path: Path, on_event: Callable[[Event], None]) -> None:
        self.execution, self.path, self.on_event = execution, path, on_event
        self.changed = threading.Condition()
        self.stopping = threading.Event()

    def begin(self, key: str, kind: str) -> None:
        """Note that a step starts."""
        self._set(StepRecord(name=key, kind=kind, state="Executing", started=time.time()))

    def note(self, key: str, **fields: Any) -> None:
        """Add to what is known of a step that runs."""
        with self.changed:
            self.execution.steps[key] = self.execution.steps[key].model_copy(update=fields)

    def end(self, key: str, kind: str, state: StepState, **fields: Any) -> None:
        """Note how a step ended."""
        with self.changed:
            before = self.execution.steps.get(key) or StepRecord(name=key, kind=kind)
        self._set(before.model_copy(update={"state": state, "finished": time.time(), **fields}))

    def step(self, key: str) -> StepRecord:
        """Return what is known of a step."""
        with self.changed:
            return self.execution.steps.get(key) or StepRecord(name=key, kind="")

    def wait(self, key: str) -> StepState:
        """Wait until a step has ended, and return how."""
        with self.changed:
            self.changed.wait_for(lambda: self._state(key) in ENDED)
            return self._state(key)

    def finish(self, state: ExecutionState, reason: str) -> Execution:
        """Note how the execution ended."""
        with self.changed:
            self.execution.state, self.execution.reason, self.execution.finished = state, reason, time.time()
            self._write()
            seconds = self.execution.finished - self.execution.started
            told = {"Succeeded": "SUCCEEDED", "Stopped": "CANCELLED"}.get(state, "FAILED")
            self.on_event(Event("run_finished", self.execution.id, state=told, seconds=seconds, message=reason))
        return self.execution

    def _state(self, key: str) -> StepState:
        step = self.execution.steps.get(key)
        return step.state if step else "Waiting"

    def _set(self, step: StepRecord) -> None:
        with self.changed:
            self.execution.steps[step.name] = step
            self._write()
            self.changed.notify_all()
            state = "CACHED" if step.cached and step.state == "Succeeded" else EVENT_STATES[step.state]
            seconds = step.finished - step.started if step.finished and step.started else 0.0
            event = Event("task_state", self.execution.id, step.name, state, seconds, message=step.reason)
            self.on_event(event)

    def _write(self) -> None:
        write_atomically(self.path, self.execution.model_dump_json(indent=1))


def record_path(home: Path, execution: str) -> Path:
    """Return where an execution's record lies."""
    return home / "executions" / execution / "record.json"


def load(home: Path, execution: str) -> Execution:
    """Read an execution.

    Raises:
        RunError: There is none of that id.
    """
    path = record_path(home, execution)
    if not path.is_file():
        raise RunError(f"there is no execution {execution!r}", where=str(home), fix="start one")
    return Execution.model_validate_json(path.read_bytes())


def earlier(home: Path, pipeline: str) -> list[Execution]:
    """Return the executions of a pipeline, newest first."""
    found = [load(home, path.parent.name) for path in (home / "executions").glob("*/record.json")]
    return sorted((one for one in found if one.pipeline == pipeline), key=lambda one: -one.started)
