"""Waiting for an execution to end, and telling what its steps do meanwhile.

The SDK's own wait knows Succeeded and Failed only, and would wait for ever on CompletedWithFailures.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from assay.components.contracts.errors import RunError
from assay.pipelines.engines.local.events import Event, Planned

from .aws import Account, Refused, talking

ENDED: dict[str, Literal["SUCCEEDED", "FAILED", "CANCELLED"]] = {
    "Succeeded": "SUCCEEDED",
    "Failed": "FAILED",
    "CompletedWithFailures": "FAILED",
    "Stopped": "CANCELLED",
}
"""Final states of an execution → ours."""
STEPS = {
    "Starting": "RUNNING",
    "Executing": "RUNNING",
    "Stopping": "RUNNING",
    "Succeeded": "SUCCEEDED",
    "Failed": "FAILED",
    "Stopped": "CANCELLED",
}
PATIENCE_SECONDS = 600.0
"""How long AWS may be out of reach; the execution itself goes on."""
POLL_SECONDS = 15.0
_FINAL = ("AccessDenied", "AccessDeniedException", "ExpiredToken", "ExpiredTokenException", "ResourceNotFound")


@dataclass(frozen=True)
class Ended:
    """How an execution ended."""

    state: Literal["SUCCEEDED", "FAILED", "CANCELLED"]
    status: str
    """The service's own word."""
    steps: tuple[dict[str, Any], ...]
    """What the service says of each."""
    reason: str

    def step(self, name: str) -> dict[str, Any] | None:
        """Return a step that succeeded, or None."""
        found = (entry for entry in self.steps if entry["StepName"] == name and entry["StepStatus"] == "Succeeded")
        return next(found, None)


@dataclass
class _Board:
    """What was told already, so that each change is told once."""

    run: str
    planned: tuple[Planned, ...]
    on_event: Callable[[Event], None]
    states: dict[str, str] = field(default_factory=dict)

    def take(self, steps: list[dict[str, Any]]) -> None:
        for step in sorted(steps, key=lambda step: str(step.get("StartTime", ""))):
            state = STEPS.get(step["StepStatus"], "PENDING")
            if state == "SUCCEEDED" and step.get("CacheHitResult"):
                state = "CACHED"
            if self.states.get(step["StepName"], "PENDING") != state:
                self._tell(step["StepName"], state, _seconds(step), step.get("FailureReason", ""))

    def close(self, state: str, reason: str) -> None:
        for task in self.planned:
            if self.states.get(task.path, "PENDING") in ("PENDING", "RUNNING"):
                self._tell(task.path, "CANCELLED" if task.path in self.states else "SKIPPED", 0.0, "")
        self.on_event(Event("run_finished", self.run, state=state, message=reason))

    def _tell(self, name: str, state: str, seconds: float, message: str) -> None:
        self.states[name] = state
        self.on_event(Event("task_state", self.run, name, state, seconds, message=message))


def wait(
    account: Account,
    arn: str,
    planned: tuple[Planned, ...],
    on_event: Callable[[Event], None],
    poll: float = POLL_SECONDS,
) -> Ended:
    """Follow an execution to its end.

    Args:
        account: Where it runs.
        arn: The execution.
        planned: The steps of the definition.
        on_event: Told what happens.
        poll: Seconds between two questions.

    Raises:
        RunError: AWS refuses to answer, or is out of reach for too long; the execution goes on.
    """
    board = _Board(arn.rpartition("/")[2], planned, on_event)
    on_event(Event("run_started", board.run, tasks=planned))
    away = 0.0
    while True:
        try:
            described, steps = _ask(account, arn)
        except RunError as error:
            away = away or time.monotonic()
            if (isinstance(error, Refused) and error.code in _FINAL) or time.monotonic() - away > PATIENCE_SECONDS:
                raise RunError(
                    f"while waiting: {error.what}", where=arn, fix=f"{error.fix}; the execution itself goes on"
                ) from error
            on_event(Event("log", board.run, message=f"{error.what}; asking again"))
        else:
            away = 0.0
            board.take(steps)
            status = str(described["PipelineExecutionStatus"])
            if status in ENDED:
                reason = _reason(described, steps)
                board.close(ENDED[status], reason)
                return Ended(ENDED[status], status, tuple(steps), reason)
        time.sleep(poll)


def _ask(account: Account, arn: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    client = account.sagemaker
    with talking("read the execution", arn):
        described = client.describe_pipeline_execution(PipelineExecutionArn=arn)
        pages = client.get_paginator("list_pipeline_execution_steps").paginate(PipelineExecutionArn=arn)
        return described, [step for page in pages for step in page.get("PipelineExecutionSteps", ())]


def _reason(described: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    """Return in one line why an execution did not succeed: its steps' own words, before the service's."""
    failed = [step for step in steps if step["StepStatus"] == "Failed" and step.get("FailureReason")]
    told = [f"{step['StepName']} failed: {step['FailureReason']}" for step in failed]
    return "; ".join(told) or str(described.get("FailureReason") or "")


def _seconds(step: dict[str, Any]) -> float:
    if step.get("StartTime") and step.get("EndTime"):
        return max(float((step["EndTime"] - step["StartTime"]).total_seconds()), 0.0)
    return 0.0
