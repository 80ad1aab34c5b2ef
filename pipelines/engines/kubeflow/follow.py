"""Waiting for a run to end, and telling what its tasks do meanwhile.

kfp's own wait returns on FAILED as on SUCCEEDED, and never on CANCELED. This one knows every final state, and bears a
server that is away for a while: the run goes on without it.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from assay.components.contracts.errors import RunError
from assay.pipelines.engines.local.events import Event, Planned

from .client import Refused, Server

Watch = Callable[[Event], None]
STATES = {
    "SUCCEEDED": "SUCCEEDED",
    "FAILED": "FAILED",
    "CANCELED": "CANCELLED",
    "SKIPPED": "SKIPPED",
    "RUNNING": "RUNNING",
    "CANCELING": "RUNNING",
    "PAUSED": "RUNNING",
}
"""State of a task here by the server's; all else is PENDING."""
ENDED = frozenset({"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"})
PATIENCE_SECONDS = 600.0
"""How long the server may be away."""


def wait(server: Server, run_id: str, planned: Iterable[Planned], on_event: Watch) -> Any:
    """Follow a run to its end and return it.

    Args:
        server: The server.
        run_id: The run.
        planned: The tasks of the pipeline.
        on_event: Told what happens.

    Raises:
        RunError: The server refuses to answer, or is away for too long; the run itself goes on.
    """
    board = _Board(run_id, tuple(planned), on_event)
    on_event(Event("run_started", run_id, tasks=board.planned))
    away = 0.0
    while True:
        try:
            run = server.call("read the run", server.client.runs.run_service_get_run, run_id=run_id)
        except RunError as error:
            away = away or time.monotonic()
            if _is_final(error) or time.monotonic() - away > PATIENCE_SECONDS:
                raise _gone_on(server, run_id, error) from error
            on_event(Event("log", run_id, message=f"{error.what}; asking again"))
        else:
            away = 0.0
            board.take(run)
            if run.state in ENDED:
                board.close(run)
                return run
        time.sleep(server.profile.poll_seconds)


class _Board:
    """What was told already, so that each change is told once."""

    def __init__(self, run_id: str, planned: tuple[Planned, ...], on_event: Watch) -> None:
        self.run_id, self.planned, self.on_event = run_id, planned, on_event
        self.states: dict[str, str] = {}
        names = [task.path.rpartition("/")[2] for task in planned]
        # The server tells a task's name without its place: one that stands in two places tells of neither.
        self.paths = {name: task.path for name, task in zip(names, planned, strict=True) if names.count(name) == 1}

    def take(self, run: Any) -> None:
        """Tell every task whose state changed."""
        for task in details(run):
            path = self.paths.get(task.display_name or "")
            state = STATES.get(task.state or "", "PENDING")
            if path and self.states.get(path, "PENDING") != state:
                self._tell(path, state, _seconds(task), _message(task))

    def close(self, run: Any) -> None:
        """Tell that what never started never will, and that the run is over."""
        for task in self.planned:
            if self.states.get(task.path, "PENDING") in ("PENDING", "RUNNING"):
                state = "CANCELLED" if self.states.get(task.path) == "RUNNING" else "SKIPPED"
                self._tell(task.path, state, 0.0, "")
        started, ended = run.created_at, run.finished_at
        seconds = (ended - started).total_seconds() if started and ended else 0.0
        self.on_event(Event("run_finished", self.run_id, state=STATES[run.state], seconds=max(seconds, 0.0)))

    def _tell(self, path: str, state: str, seconds: float, message: str) -> None:
        self.states[path] = state
        self.on_event(Event("task_state", self.run_id, path, state, seconds, message=message))


def details(run: Any) -> list[Any]:
    """Return what the server tells of a run's tasks."""
    return (run.run_details and run.run_details.task_details) or []


def failures(run: Any) -> str:
    """Return in one line why a run failed: its tasks' own words, before those of what contains them."""
    failed = [task for task in details(run) if task.state == "FAILED" and _message(task)]
    told = [f"{task.display_name} failed: {_message(task)}" for task in failed]
    return "; ".join(told) or (run.error and run.error.message) or "the server does not say why"


def _is_final(error: RunError) -> bool:
    """Return whether asking again is of no use."""
    return isinstance(error, Refused) and error.status < 500 and error.status != 429


def _gone_on(server: Server, run_id: str, error: RunError) -> RunError:
    fix = f"{error.fix}; the run goes on, see {server.url(run_id)}"
    return RunError(f"while waiting for run {run_id}: {error.what}", where=error.where, fix=fix)


def _message(task: Any) -> str:
    text = (task.error and task.error.message) or ""
    return str(text).strip().partition("\n")[0]


def _seconds(task: Any) -> float:
    if task.start_time and task.end_time:
        return max(float((task.end_time - task.start_time).total_seconds()), 0.0)
    return 0.0
