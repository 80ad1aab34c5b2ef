"""Execute a pipeline definition on this machine: `python -m assay.pipelines.engines.sagemaker.emulate DEFINITION`.

The definition's JSON is what runs: its expressions, conditions, triggers, retries and cache, every request in a
container where a Docker daemon answers, else as a process whose /opt/ml is a private folder, with S3 by moto's server.
Not emulated: IAM, VPC, KMS, instance types, several hosts of one job, MaxWaitTimeInSeconds, and every kind of step but
Processing, Training, Condition, ForEach (without IterationOutputs) and Fail.
"""

import argparse
import contextlib
import json
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from assay.components.contracts.errors import AssayError, RunError
from assay.components.runtime import s3
from assay.pipelines.engines.local.events import Event

from .definition import planned
from .emulation import record
from .emulation.aws import client, provide
from .emulation.expressions import Scope, property_files
from .emulation.graph import Graph
from .emulation.jobs import Fault, Site
from .emulation.machines import docker_answers
from .emulation.record import Board, Execution
from .emulation.steps import Worker
from .validate import walk

ACCOUNT = "123456789012"
KINDS = ("Processing", "Training", "Condition", "ForEach", "Fail")
_TYPES: dict[str, Callable[[str], Any]] = {
    "String": str,
    "Integer": int,
    "Float": float,
    "Boolean": lambda text: {"true": True, "false": False}[text.lower()],
}


@dataclass
class Emulator:
    """SageMaker Pipelines of one account."""

    home: Path
    """Folder of the executions; the earlier ones are the step cache."""
    aws: Mapping[str, str]
    """Environment that leads boto3 to S3, for us and in every container."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """More environment of every container."""
    containers: bool = field(default_factory=docker_answers)
    """Run requests in Docker, or else as processes."""
    images: Mapping[str, str] = field(default_factory=dict)
    """Image of a request → what this machine's Docker calls it."""
    limit: int = 2
    """Jobs at the same time."""
    grace: float = 120.0
    """Seconds between SIGTERM and SIGKILL when an execution is stopped."""
    pace: float = 1.0
    """Seconds that a second of waiting between attempts takes."""
    on_event: Callable[[Event], None] = lambda event: None
    board: Board | None = None
    """Of the execution that runs."""

    def run(
        self,
        definition: Mapping[str, Any],
        pipeline: str,
        parameters: Mapping[str, Any] | None = None,
        faults: Mapping[str, list[Fault]] | None = None,
        execution_id: str = "",
    ) -> Execution:
        """Execute a definition and return its record.

        Args:
            definition: The JSON object.
            pipeline: The pipeline's name; executions of one name share a cache.
            parameters: Values, as StartPipelineExecution takes them.
            faults: Step → what happens to its attempts, in order.
            execution_id: Made up when left out.

        Raises:
            RunError: The definition holds a kind of step that is not emulated, or the parameters do not fit.
        """
        execution = Execution(
            id=execution_id or uuid.uuid4().hex[:12],
            pipeline=pipeline,
            parameters=bind(definition, parameters or {}),
            started=time.time(),
        )
        return self._drive(definition, execution, faults or {})

    def retry(
        self, definition: Mapping[str, Any], execution_id: str, faults: Mapping[str, list[Fault]] | None = None
    ) -> Execution:
        """Go on with an execution that failed or was stopped: what succeeded stays, as RetryPipelineExecution does.

        Raises:
            RunError: There is no such execution, or it succeeded.
        """
        execution = record.load(self.home, execution_id)
        if execution.state == "Succeeded":
            raise RunError("this execution succeeded", where=execution_id, fix="start a new one")
        execution.steps = {key: step for key, step in execution.steps.items() if step.state == "Succeeded"}
        execution.state, execution.reason = "Executing", ""
        return self._drive(definition, execution, faults or {})

    def stop(self) -> None:
        """Stop the execution that runs: SIGTERM to its jobs, SIGKILL after the time of grace."""
        if self.board:
            self.board.stopping.set()

    def _drive(
        self, definition: Mapping[str, Any], execution: Execution, faults: Mapping[str, list[Fault]]
    ) -> Execution:
        steps = list(walk(definition["Steps"]))
        unknown = {step["Name"]: step["Type"] for step in steps if step["Type"] not in KINDS}
        if unknown:
            raise RunError(f"steps that are not emulated: {unknown}", fix="run this definition in an account")
        path = record.record_path(self.home, execution.id)
        path.parent.mkdir(parents=True, exist_ok=True)
        board = self.board = Board(execution, path, self.on_event)
        self.on_event(Event("run_started", execution.id, tasks=planned(definition)))
        worker = Worker(board, self._site(board), self.home, faults, self.limit, self.pace)
        return board.finish(*Graph(board, worker).run(definition["Steps"], self._scope(definition, board)))

    def _site(self, board: Board) -> Site:
        return Site(
            client=client("s3", self.aws),
            folder=board.path.parent / "jobs",
            environment={**self.aws, **self.environment},
            containers=self.containers,
            images=self.images,
            stopping=board.stopping,
            grace=self.grace,
        )

    def _scope(self, definition: Mapping[str, Any], board: Board) -> Scope:
        storage, execution = client("s3", self.aws), board.execution
        arn = f"arn:aws:sagemaker:{self.aws['AWS_DEFAULT_REGION']}:{ACCOUNT}:pipeline/{execution.pipeline}"
        facts = {
            "PipelineExecutionId": execution.id,
            "PipelineExecutionArn": f"{arn}/execution/{execution.id}",
            "PipelineName": execution.pipeline,
            "PipelineArn": arn,
            "StartDateTime": datetime.fromtimestamp(execution.started, UTC).isoformat(),
            "CurrentDateTime": datetime.now(UTC).isoformat(),
        }

        def read(uri: str) -> Any:
            bucket, key = s3.split(uri)
            try:
                return json.loads(storage.get_object(Bucket=bucket, Key=key)["Body"].read())
            except storage.exceptions.NoSuchKey as error:
                raise RunError("there is no such object", where=uri) from error

        files = property_files(definition["Steps"])
        return Scope(execution.parameters, facts, lambda key: board.step(key).properties, files, read)


def bind(definition: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of every parameter of a definition.

    Raises:
        RunError: One is unknown, missing or of another type.
    """
    declared = {entry["Name"]: entry for entry in definition.get("Parameters", ())}
    for name in sorted(given.keys() - declared.keys()):
        raise RunError(f"there is no parameter {name!r}", fix=f"the pipeline has {sorted(declared)}")
    values = {}
    for name, entry in declared.items():
        if name not in given and "DefaultValue" not in entry:
            raise RunError(f"the parameter {name!r} has no value", fix="give it one")
        value = given.get(name, entry.get("DefaultValue"))
        try:
            values[name] = _TYPES[entry["Type"]](value) if isinstance(value, str) else value
        except (ValueError, KeyError) as error:
            raise RunError(f"{value!r} is not a {entry['Type']}", where=name) from error
    return values


@contextlib.contextmanager
def _stoppable(emulator: Emulator) -> Iterator[None]:
    before = {number: signal.signal(number, lambda *_: emulator.stop()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
    """Emulate a compiled definition; return 0 when it succeeded, 1 otherwise, 2 for an error of the input."""
    from .emulation.aws import local_aws

    parser = argparse.ArgumentParser(prog="python -m assay.pipelines.engines.sagemaker.emulate", description=__doc__)
    parser.add_argument("definition", type=Path, help="a pipeline definition; its templates lie in <stem>.tasks")
    parser.add_argument("--parameter", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--home", type=Path, default=Path(".assay/sagemaker"))
    parser.add_argument("--limit", type=int, default=2, help="jobs at the same time")
    parser.add_argument("--processes", action="store_true", help="no containers, even where Docker is")
    arguments = parser.parse_args(argv)

    def say(event: Event) -> None:
        words = [event.state.lower(), event.task, event.message]
        sys.stderr.write(" ".join(filter(None, words)) + "\n")

    try:
        definition = json.loads(arguments.definition.read_bytes())
        with local_aws() as aws:
            provide(definition, arguments.definition.with_suffix(".tasks"), aws)
            # moto forgets with this process, so a cache that outlives it would name files that are gone
            home = arguments.home.absolute() / time.strftime("%Y%m%d-%H%M%S")
            emulator = Emulator(home, aws, limit=arguments.limit, on_event=say)
            emulator.containers = emulator.containers and not arguments.processes
            with _stoppable(emulator):
                given = dict(text.partition("=")[::2] for text in arguments.parameter)
                execution = emulator.run(definition, arguments.definition.stem, given)
    except (AssayError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0 if execution.state == "Succeeded" else 1


if __name__ == "__main__":
    sys.exit(main())
