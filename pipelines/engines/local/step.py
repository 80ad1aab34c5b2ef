"""A leaf of the graph: take a step's result from this run, from the cache, or from running it."""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from assay.components.contracts.artifacts import write_atomically
from assay.components.contracts.errors import AssayError, RunError
from assay.components.runtime.context import RESUME_EXIT
from assay.pipelines.ir import placeholders, values
from assay.pipelines.ir.model import Component, Container, Pipeline, Task

from . import process
from .artifacts import Artifact, file_sizes
from .cache import Result, StepCache, step_key
from .cores import Cores
from .events import DONE
from .process import Command, Ended, Guard, Stop
from .recorder import Recorder, cannot_write
from .store import read_json, task_folder, try_lock, write_json

USERS_FAULT = 2
"""Exit code of a step whose input is at fault: to run it again would not help."""
_INLINE_BYTES = 100_000
"""Linux takes 128 KiB in one argument."""


@dataclass(frozen=True)
class Outcome:
    """How a task ended, and what it left."""

    state: str
    parameters: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, list[Artifact]] = field(default_factory=dict)
    message: str = ""
    exit_code: int = 0
    anew: bool = False
    """Whether it ran because `from_step` named it or something before it."""


@dataclass(frozen=True)
class Session:
    """What every task of a run shares."""

    pipeline: Pipeline
    home: Path
    run_id: str
    run_values: Mapping[str, str]
    """Values of the placeholders that say which run this is."""
    environment: Mapping[str, str]
    recorder: Recorder
    cache: StepCache
    cores: Cores
    stop: Stop
    guard: Guard
    use_cache: bool
    from_step: frozenset[str]
    """Paths (without iterations) of the tasks to run anew."""


@dataclass(frozen=True)
class Step:
    """One container task with its inputs."""

    session: Session
    path: str
    task: Task
    component: Component
    container: Container
    parameters: dict[str, Any]
    artifacts: dict[str, list[Artifact]]
    anew: bool

    @property
    def title(self) -> str:
        """The display name."""
        return self.task.task_info.name or self.path

    @property
    def folder(self) -> Path:
        """The task's folder in the run."""
        return task_folder(self.session.home, self.session.run_id, self.path)

    @property
    def outputs(self) -> Path:
        """The folder of its outputs."""
        return self.folder / "outputs"

    def run(self) -> Outcome:
        """Return the step's outcome; nothing that a user or a disk does raises."""
        try:
            return self._run()
        except OSError as error:
            outcome = Outcome("FAILED", message=str(cannot_write(error, self.folder, self.session.run_id)))
        except AssayError as error:
            outcome = Outcome("FAILED", message=str(error), exit_code=USERS_FAULT)
        self._record("FAILED", message=outcome.message, exit_code=outcome.exit_code)
        return outcome

    def _run(self) -> Outcome:
        self.folder.mkdir(parents=True, exist_ok=True)
        key = self._key()
        if done := self._finished_before(key):
            return done
        caching = self.task.caching_options.enable_cache and self.session.use_cache and not self.anew
        if caching and (hit := self._cached(key)):
            return hit
        with self._alone(key) as lock:
            if lock is None:
                return Outcome("CANCELLED", message=self.session.stop.reason)
            if caching and (hit := self._cached(key)):  # whoever held the lock may have been running this very step
                return hit
            return self._execute(key, lock)

    def _key(self) -> str:
        caching = self.task.caching_options
        run_values = {**self.session.run_values, "pipeline_task_name": self.path.rpartition("/")[2]}
        return step_key(self.component, self.container, caching.cache_key, self.parameters, self.artifacts, run_values)

    def _finished_before(self, key: str) -> Outcome | None:
        """Return what the step left when it already ended well in this run (which is then being resumed)."""
        status = read_json(self.folder / "status.json") or {}
        if status.get("state") not in DONE or status.get("key") != key:
            return None
        try:
            result = Result.of(status["result"])
        except (KeyError, TypeError):  # written by another version
            return None
        if not result.is_whole(self.outputs):
            self.session.recorder.log(self.path, "its outputs are damaged; it runs again")
            return None
        self._record(status["state"], seconds=result.seconds, key=key, started=status["started"], message="")
        return self._outcome(status["state"], result)

    def _cached(self, key: str) -> Outcome | None:
        result = self.session.cache.get(key, self.outputs)
        if result is None:
            return None
        self._finish("CACHED", key, replace(result, seconds=0.0), time.time())
        return self._outcome("CACHED", result)

    def _outcome(self, state: str, result: Result) -> Outcome:
        return Outcome(state, result.parameters, result.artifacts, anew=self.anew)

    def _finish(self, state: str, key: str, result: Result, started: float) -> None:
        status = {"state": state, "key": key, "started": started, "result": result.dump()}
        artifacts = {
            name: {"artifacts": [entry.runtime() for entry in found]} for name, found in result.artifacts.items()
        }
        output = {"parameterValues": result.parameters, "artifacts": artifacts}
        write_json(self.folder / "executor_output.json", output)  # as complete for a hit or a container as for a step
        write_atomically(self.folder / "status.json", json.dumps(status, indent=1))
        self._record(state, seconds=result.seconds, key=key, started=started, message="")

    def _record(self, state: str, **fields: Any) -> None:
        self.session.recorder.task(self.path, self.title, state, **fields)

    @contextlib.contextmanager
    def _alone(self, key: str) -> Iterator[IO[Any] | None]:
        """Hold the lock of a key: two tasks that are the same share a work folder, also in two processes.

        Yields None when the run is to end before the lock is free.
        """
        path = self.session.home / "work" / f"{key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        told = False
        while True:
            with path.open("a+") as file:
                if try_lock(file) and path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    try:
                        yield file
                    finally:
                        path.unlink(missing_ok=True)
                    return
            if not told:
                self.session.recorder.log(self.path, "the same step is running elsewhere; waiting for it")
                told = True
            if self.session.stop.event.wait(0.1):
                yield None
                return

    def _execute(self, key: str, lock: IO[Any]) -> Outcome:
        """Run the step, again if its retry policy says so, and keep what it leaves."""
        work = self.session.home / "work" / key
        if self.anew and read_json(self.folder / "status.json") is None:
            shutil.rmtree(work, ignore_errors=True)  # anew means from the beginning, not from an old checkpoint
        failures = 0
        while True:
            ended, outcome, result = self._attempt(key, lock)
            seconds = ended.seconds if ended else 0.0
            if result:
                result = replace(result, seconds=seconds)
                self._keep(key, result)
                self._finish("SUCCEEDED", key, result, time.time() - seconds)
                shutil.rmtree(work, ignore_errors=True)
                return outcome
            failures += 1
            if outcome.state == "FAILED" and self._may_retry(ended, failures):
                delay = self.task.retry_policy.delay(failures)
                self.session.recorder.log(
                    self.path, f"attempt {failures} failed, next in {delay:g} s: {outcome.message}"
                )
                if not self.session.stop.event.wait(delay):
                    continue
                outcome = replace(outcome, state="CANCELLED", message=self.session.stop.reason)
            if ended:
                self._record(outcome.state, seconds=seconds, message=outcome.message, exit_code=outcome.exit_code)
            return outcome

    def _may_retry(self, ended: Ended | None, failures: int) -> bool:
        fault = ended is not None and ended.exit_code == USERS_FAULT
        return not fault and failures <= self.task.retry_policy.max_retry_count

    def _attempt(self, key: str, lock: IO[Any]) -> tuple[Ended | None, Outcome, Result | None]:
        session = self.session
        with session.cores.hold(self.container.resources.cores, session.stop) as cores:
            if session.stop.wanted:
                return None, Outcome("CANCELLED", message=session.stop.reason), None
            for stale in ("executor_output.json", "error.json"):
                (self.folder / stale).unlink(missing_ok=True)
            shutil.rmtree(self.outputs, ignore_errors=True)
            (self.outputs / ".parameters").mkdir(parents=True)
            executor_input = self._executor_input()
            write_json(self.folder / "executor_input.json", executor_input)
            write_json(self.folder / "status.json", {"state": "RUNNING", "key": key, "started": time.time()})
            self._record("RUNNING", key=key, started=time.time(), seconds=0.0, message="", exit_code=0)
            log = self.folder / "log.txt"
            position = log.stat().st_size if log.exists() else 0
            ended = process.run(
                self._command(executor_input, key, cores, lock),
                session.stop,
                session.guard,
                lambda report: session.recorder.progress(self.path, report),
            )
        return ended, *self._judge(ended, executor_input, position)

    def _judge(self, ended: Ended, executor_input: dict[str, Any], position: int) -> tuple[Outcome, Result | None]:
        """Return what a process that ended makes of the step."""
        stop = self.session.stop
        if ended.exit_code == 0 and not ended.timed_out:
            try:
                result = self._collect(executor_input)
            except RunError as error:
                return Outcome("FAILED", message=str(error), exit_code=1), None
            return self._outcome("SUCCEEDED", result), result
        if stop.wanted and not ended.timed_out:
            return Outcome("CANCELLED", message=stop.reason, exit_code=ended.exit_code), None
        if ended.timed_out:
            message = f"it took longer than {self._timeout():g} s, and was stopped"
            return Outcome("FAILED", message=f"{message} (log: {self.folder / 'log.txt'})", exit_code=1), None
        if ended.exit_code == RESUME_EXIT:
            return Outcome(
                "CANCELLED", message="the step was told to stop; resume the run", exit_code=RESUME_EXIT
            ), None
        return Outcome("FAILED", message=self._why(ended.exit_code, position), exit_code=ended.exit_code), None

    def _why(self, exit_code: int, position: int) -> str:
        error = read_json(self.folder / "error.json")
        if isinstance(error, dict):
            return str(AssayError(error.get("what", ""), where=error.get("where", ""), fix=error.get("fix", "")))
        log = self.folder / "log.txt"
        with log.open("rb") as file:
            file.seek(max(position, log.stat().st_size - 8192))
            lines = file.read().decode(errors="replace").strip().splitlines()
        how = f"exit code {exit_code}"
        if exit_code < 0:
            how = f"killed by {signal.Signals(-exit_code).name}"
            how += " (out of memory?)" if -exit_code == signal.SIGKILL else ""
        return f"{how}: {lines[-1].strip() if lines else 'it said nothing'} (log: {log})"

    def _executor_input(self) -> dict[str, Any]:
        """Return KFP's ExecutorInput: where inputs lie, where outputs go."""
        outputs = self.component.output_definitions
        artifacts = {
            name: Artifact(
                name, str(self.outputs / name), spec.artifact_type.model_dump(by_alias=True, exclude_unset=True)
            )
            for name, spec in outputs.artifacts.items()
        }
        return {
            "inputs": {
                "parameterValues": self.parameters,
                "artifacts": {
                    name: {"artifacts": [entry.runtime() for entry in found]} for name, found in self.artifacts.items()
                },
            },
            "outputs": {
                "parameters": {
                    name: {"outputFile": str(self.outputs / ".parameters" / name)} for name in outputs.parameters
                },
                "artifacts": {name: {"artifacts": [entry.runtime()]} for name, entry in artifacts.items()},
                "outputFile": str(self.folder / "executor_output.json"),
            },
        }

    def _command(self, executor_input: dict[str, Any], key: str, cores: float, lock: IO[Any]) -> Command:
        run_values = {
            **self.session.run_values,
            "pipeline_task_name": self.path.rpartition("/")[2],
            "pipeline_task_uuid": f"{self.session.run_id}/{self.path}",
        }
        template = [*self.container.command, *self.container.args]
        if "assay.components.runtime" in template and len(json.dumps(executor_input).encode()) > _INLINE_BYTES:
            template = [f"@{self.folder / 'executor_input.json'}" if part == "{{$}}" else part for part in template]
        line = placeholders.resolve_command(template, executor_input, run_values)
        if not line:
            raise RunError("the container has no command of its own", where=self.path, fix="give it a command")
        if line[0] in ("python", "python3"):
            line[0] = sys.executable
        given = {
            entry.name: placeholders.resolve_text(entry.value, executor_input, run_values)
            for entry in self.container.env
        }
        threads = str(max(1, int(cores)))
        environment = {
            **self.session.environment,
            "ASSAY_WORK": str(self.session.home / "work" / key),
            "ASSAY_PROGRESS": str(self.folder / "progress.jsonl"),
            "ASSAY_CPUS": threads,
            "OMP_NUM_THREADS": threads,
            **given,
        }
        log, progress = self.folder / "log.txt", self.folder / "progress.jsonl"
        return Command(line, environment, log, progress, self._timeout(), lock)

    def _timeout(self) -> float | None:
        label = self.component.executor_label
        asked = (
            self.session.pipeline.platform("kubernetes", label).get("activeDeadlineSeconds"),
            self.session.pipeline.platform("local", label).get("timeout"),
        )
        return min((float(seconds) for seconds in asked if seconds), default=None)

    def _collect(self, executor_input: dict[str, Any]) -> Result:
        """Return what the step left, as KFP's launcher reads it.

        Raises:
            RunError: A declared parameter was not written, or is of another type.
        """
        written = read_json(self.folder / "executor_output.json") or {}
        declared = self.component.output_definitions
        parameters = {
            name: self._parameter(name, spec.parameter_type, written.get("parameterValues", {}))
            for name, spec in declared.parameters.items()
        }
        artifacts = {}
        for name in declared.artifacts:
            planned = executor_input["outputs"]["artifacts"][name]["artifacts"][0]
            told = (written.get("artifacts", {}).get(name, {}).get("artifacts") or [{}])[0]
            uri = told.get("custom_path") or told.get("uri") or planned["uri"]
            artifact = Artifact(name, uri, planned["type"], told.get("metadata") or {})
            artifacts[name] = [artifact.sealed(self.session.home)]
        shutil.rmtree(self.outputs / ".parameters", ignore_errors=True)
        return Result(parameters, artifacts, file_sizes(self.outputs))

    def _parameter(self, name: str, kind: str, written: Mapping[str, Any]) -> Any:
        where = f"{self.path}: output {name}"
        if name in written:
            return values.cast(written[name], kind, where)
        try:
            text = (self.outputs / ".parameters" / name).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise RunError(
                f"the output parameter {name!r} was not written", where=self.path, fix="return it on every path"
            ) from error
        return values.parse_text(text, kind, where)

    def _keep(self, key: str, result: Result) -> None:
        """Put the result into the cache; a disk that has no room for it does not undo the step."""
        if not self.task.caching_options.enable_cache:
            return
        try:
            self.session.cache.put(key, self.outputs, result)
        except OSError as error:
            self.session.recorder.log(self.path, f"the result is not cached: {error}")
