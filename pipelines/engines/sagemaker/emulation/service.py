"""The part of SageMaker's API that moto leaves out: an execution really runs, and its steps can be listed.

With it, what submits to AWS and waits there is tested from end to end, over HTTP, without an account.
"""

import io
import json
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..emulate import Emulator
from .aws import client
from .record import StepRecord

_JOBS = {"Processing": "processing-job", "Training": "training-job"}
Handler = Callable[[dict[str, Any]], dict[str, Any] | None]


@dataclass
class _Started:
    """An execution that was started over HTTP."""

    arn: str
    pipeline: str
    display_name: str
    token: str
    emulator: Emulator
    thread: threading.Thread


class Service:
    """A WSGI application in front of moto's.

    Args:
        backend: moto's application.
        emulator: Makes an emulator; the server runs by then.
    """

    def __init__(self, backend: Callable[..., Iterable[bytes]], emulator: Callable[[], Emulator]) -> None:
        self.backend, self.emulator = backend, emulator
        self.started: list[_Started] = []
        self.lock = threading.Lock()
        self.handlers: dict[str, Handler] = {
            "StartPipelineExecution": self._start,
            "StopPipelineExecution": self._stop,
            "DescribePipelineExecution": self._describe,
            "ListPipelineExecutions": self._list,
            "ListPipelineExecutionSteps": self._steps,
            "DescribeProcessingJob": self._job,
        }

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request, or pass it on."""
        handler = self.handlers.get(environ.get("HTTP_X_AMZ_TARGET", "").removeprefix("SageMaker."))
        if handler is None:
            return self.backend(environ, start_response)
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        answer = handler(json.loads(body))
        if answer is None:
            return self.backend({**environ, "wsgi.input": io.BytesIO(body)}, start_response)
        start_response("200 OK", [("Content-Type", "application/x-amz-json-1.1")])
        return [json.dumps(answer).encode()]

    def join(self) -> None:
        """Stop what runs and wait for it."""
        for one in self.started:
            one.emulator.stop()
            one.thread.join()

    def _start(self, request: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            token = request.get("ClientRequestToken", "")
            known = next((one for one in self.started if token and one.token == token), None)
            started = known or self._begin(request, token)
            return {"PipelineExecutionArn": started.arn}

    def _begin(self, request: dict[str, Any], token: str) -> _Started:
        emulator, name = self.emulator(), request["PipelineName"]
        described = client("sagemaker", emulator.aws).describe_pipeline(PipelineName=name)
        run = uuid.uuid4().hex[:12]
        given = {entry["Name"]: entry["Value"] for entry in request.get("PipelineParameters", ())}
        definition = json.loads(described["PipelineDefinition"])
        thread = threading.Thread(target=emulator.run, args=(definition, name, given, None, run))
        arn = f"{described['PipelineArn']}/execution/{run}"
        started = _Started(arn, name, request.get("PipelineExecutionDisplayName", ""), token, emulator, thread)
        self.started.append(started)
        thread.start()
        return started

    def _stop(self, request: dict[str, Any]) -> dict[str, Any]:
        started = self._find(request)
        started.emulator.stop()
        return {"PipelineExecutionArn": started.arn}

    def _describe(self, request: dict[str, Any]) -> dict[str, Any]:
        return _summary(self._find(request))

    def _list(self, request: dict[str, Any]) -> dict[str, Any]:
        found = [_summary(one) for one in self.started if one.pipeline == request["PipelineName"]]
        return {"PipelineExecutionSummaries": found}

    def _steps(self, request: dict[str, Any]) -> dict[str, Any]:
        started = self._find(request)
        steps = _steps_of(started.emulator)
        return {"PipelineExecutionSteps": [_step(step, started.arn) for step in steps if step.started]}

    def _job(self, request: dict[str, Any]) -> dict[str, Any] | None:
        steps = (step for one in self.started for step in _steps_of(one.emulator))
        wanted = request["ProcessingJobName"]
        return next((step.properties for step in steps if step.properties.get("ProcessingJobName") == wanted), None)

    def _find(self, request: dict[str, Any]) -> _Started:
        return next(one for one in self.started if one.arn == request["PipelineExecutionArn"])


def _summary(started: _Started) -> dict[str, Any]:
    board = started.emulator.board
    execution = board.execution if board else None
    refused = "Executing" if started.thread.is_alive() else "Failed"  # parameters that do not fit start nothing
    return {
        "PipelineExecutionArn": started.arn,
        "PipelineExecutionDisplayName": started.display_name,
        "PipelineExecutionStatus": execution.state if execution else refused,
        "FailureReason": execution.reason if execution else "",
        "StartTime": execution.started if execution else 0.0,
    }


def _steps_of(emulator: Emulator) -> list[StepRecord]:
    if not emulator.board:
        return []
    with emulator.board.changed:
        return list(emulator.board.execution.steps.values())


def _step(step: StepRecord, arn: str) -> dict[str, Any]:
    told: dict[str, Any] = {"StepName": step.name, "StepStatus": step.state, "StartTime": step.started}
    if step.finished:
        told["EndTime"] = step.finished
    if step.reason:
        told["FailureReason"] = step.reason
    if step.cached:
        told["CacheHitResult"] = {"SourcePipelineExecutionArn": arn}
    if step.kind in _JOBS and step.properties:
        place = arn.partition(":pipeline/")[0]
        name = step.properties[f"{step.kind}JobName"]
        told["Metadata"] = {f"{step.kind}Job": {"Arn": f"{place}:{_JOBS[step.kind]}/{name}"}}
    elif step.kind == "Condition" and step.properties:
        told["Metadata"] = {"Condition": {"Outcome": str(step.properties["Outcome"])}}
    return told
