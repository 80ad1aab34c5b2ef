"""A step that is a job: its request resolved and checked, the cache asked, the job run, and again by its policies."""

import threading
import time
import uuid
from collections.abc import Mapping
from functools import cache as remember
from pathlib import Path
from typing import Any

from assay.components.contracts.errors import RunError

from . import cache
from .expressions import Scope
from .jobs import JOBS, Fault, JobFailed, JobStopped, Site
from .record import Board

ARGUMENT_CHARACTERS = 256
"""Of one container argument; the service counts after it has filled in the expressions."""
_SHAPES = {"Processing": "CreateProcessingJobRequest", "Training": "CreateTrainingJobRequest"}


class Worker:
    """Runs the jobs of one execution.

    Args:
        board: Where states are kept.
        site: What the jobs share.
        home: Holds the earlier executions, which are the cache.
        faults: Step → what happens to its attempts, in order.
        limit: Jobs at the same time.
        pace: Seconds that a second of waiting between attempts takes.
    """

    def __init__(
        self, board: Board, site: Site, home: Path, faults: Mapping[str, list[Fault]], limit: int, pace: float
    ) -> None:
        self.board, self.site, self.home, self.pace = board, site, home, pace
        self.faults = {step: list(several) for step, several in faults.items()}
        self.slots = threading.BoundedSemaphore(limit)

    def run(self, step: dict[str, Any], scope: Scope, key: str) -> None:
        """Run a step to its end on the board.

        Raises:
            JobFailed: Its last attempt failed.
            JobStopped: The execution is stopping.
            RunError: An expression or the request is wrong.
        """
        kind, caching = step["Type"], step.get("CacheConfig", {})
        self._take_slot()
        try:
            self.board.begin(key, kind)
            request = scope.value(step["Arguments"])
            check(kind, request)
            digest = cache.step_key(kind, request) if caching.get("Enabled") else ""
            if digest and self._from_cache(key, kind, digest, caching.get("ExpireAfter", "P365D")):
                return
            properties = self._attempts(step, key, request)
            self.board.end(key, kind, "Succeeded", properties=properties, cache_key=digest)
        finally:
            self.slots.release()

    def _take_slot(self) -> None:
        while not self.slots.acquire(timeout=0.1):
            if self.board.stopping.is_set():
                raise JobStopped

    def _from_cache(self, key: str, kind: str, digest: str, expires: str) -> bool:
        pipeline = self.board.execution.pipeline
        found = cache.find(self.home, pipeline, key, digest, expires, time.time())
        if found:
            self.board.end(key, kind, "Succeeded", properties=found.properties, cache_key=digest, cached=True)
        return found is not None

    def _attempts(self, step: dict[str, Any], key: str, request: dict[str, Any]) -> dict[str, Any]:
        policies, began = step.get("RetryPolicies", []), time.monotonic()
        used = [0] * len(policies)
        while True:
            name = f"pipelines-{self.board.execution.id}-{step['Name'][:24]}-{uuid.uuid4().hex[:10]}"
            jobs = [*self.board.step(key).jobs, name]
            self.board.note(key, jobs=jobs, attempts=len(jobs))
            faults = self.faults.get(step["Name"])
            try:
                return JOBS[step["Type"]](self.site, name, request).run(faults.pop(0) if faults else None)
            except JobFailed as failed:
                place = next((at for at, one in enumerate(policies) if failed.exception in one["ExceptionType"]), None)
                if place is None or _spent(policies[place], used[place], time.monotonic() - began):
                    raise
                policy = policies[place]
                pause = policy.get("IntervalSeconds", 1) * policy.get("BackoffRate", 2.0) ** used[place]
                used[place] += 1
                if self.site.stopping.wait(pause * self.pace):
                    raise JobStopped from failed


def check(kind: str, request: dict[str, Any]) -> None:
    """Check a request after its expressions were filled in, as the service does when it starts the job.

    Raises:
        RunError: A field is of another type than the service wants, or an argument is too long.
    """
    from botocore.validate import ParamValidator

    report = ParamValidator().validate({**request, f"{kind}JobName": "name"}, _shape(kind))
    if report.has_errors():
        raise RunError(f"the request is not one that Create{kind}Job takes: {report.generate_report()}")
    specification = request.get("AppSpecification") or request.get("AlgorithmSpecification") or {}
    for argument in specification.get("ContainerArguments") or ():
        if len(argument) > ARGUMENT_CHARACTERS:
            raise RunError(
                f"the argument {argument[:40]!r}… has {len(argument)} characters, at most {ARGUMENT_CHARACTERS} pass",
                fix="hand it over as an artifact",
            )


def _spent(policy: Mapping[str, Any], used: int, seconds: float) -> bool:
    if "MaxAttempts" in policy:
        return used >= int(policy["MaxAttempts"])
    return seconds >= 60 * float(policy["ExpireAfterMin"])


@remember
def _shape(kind: str) -> Any:
    import botocore.session

    return botocore.session.get_session().get_service_model("sagemaker").shape_for(_SHAPES[kind])
