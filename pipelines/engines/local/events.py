"""What the engine tells while it runs."""

from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["PENDING", "RUNNING", "SUCCEEDED", "CACHED", "SKIPPED", "FAILED", "CANCELLED"]
DONE = ("SUCCEEDED", "CACHED")
"""The states in which a task has outputs."""


@dataclass(frozen=True)
class Planned:
    """A task as it is known before the run."""

    path: str
    """For example `exit-handler-1/train`; an iteration of a loop later shows as `for-loop-2[0]/train`."""
    title: str
    """The display name."""
    kind: Literal["container", "importer", "dag"]

    @property
    def is_container(self) -> bool:
        """Whether it runs a command (and so takes time)."""
        return self.kind == "container"


@dataclass(frozen=True)
class Event:
    """One thing that happened in a run."""

    kind: Literal["run_started", "task_state", "task_progress", "log", "run_finished"]
    run_id: str
    task: str = ""
    """Path of the task; empty when the event is about the run."""
    state: str = ""
    seconds: float = 0.0
    """How long the task (or the run) took, once it ended."""
    progress: dict[str, Any] = field(default_factory=dict)
    """The step's last report: time, done, total, unit, and values such as loss."""
    message: str = ""
    tasks: tuple[Planned, ...] = ()
    """With `run_started`: every task of the pipeline."""
