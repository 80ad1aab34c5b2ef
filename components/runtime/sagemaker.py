"""The entry point of every step in SageMaker's containers: `python -m assay.components.runtime.sagemaker`.

It turns what SageMaker gives a Processing or Training container into KFP's ExecutorInput, lets the ordinary entry point
run the component, and puts what came out where SageMaker looks for it:

    /opt/ml/processing/input/task/task.json   the task template (Training: /opt/ml/input/data/task/task.json)
    …/input/NAME                              an input artifact
    /opt/ml/processing/output/NAME            an output artifact (Training: /opt/ml/model/NAME)
    …/output/params/params.json               the output parameters, flat; lists and mappings as JSON text
    …/NAME/.assay-metadata.json               an artifact's KFP metadata, and the file's name where it is one file
    /opt/ml/output/message                    why it failed, at most 1 kB (Training: /opt/ml/output/failure)

Whoever emulates the service without containers sets `ASSAY_ML_ROOT` to a folder that stands for /opt/ml.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..contracts.artifacts import METADATA
from ..contracts.errors import AssayError, RunError
from . import s3
from .context import RESUME_EXIT
from .job import Job
from .supervise import Child
from .task import Artifact, Parameter, Template, parse, typed

MESSAGE_BYTES = 1024
DATA = ".assay-data"
"""A component makes its output itself, and SageMaker's output folders exist: it writes here, inside of them."""


@dataclass(frozen=True)
class Task:
    """One task: its template, its job, and what the container was given."""

    template: Template
    job: Job
    given: dict[str, str]
    """Values of the parameters that are not constants."""
    scratch: Path

    def executor_input(self) -> dict[str, Any]:
        """Return KFP's ExecutorInput.

        Raises:
            RunError: An input is missing or is not of its type.
        """
        inputs = {name: self._artifact(name, entry) for name, entry in self.template.artifacts.items()}
        values = {name: self._value(name, entry) for name, entry in self.template.parameters.items()}
        outputs = self.template.outputs
        return {
            "inputs": {
                "parameterValues": {name: value for name, value in values.items() if value is not None},
                "artifacts": {name: {"artifacts": [entry]} for name, entry in inputs.items() if entry},
            },
            "outputs": {
                "parameters": {
                    name: {"outputFile": str(self.scratch / "parameters" / name)} for name in outputs.parameters
                },
                "artifacts": {
                    name: {"artifacts": [_runtime(name, self.job.outputs / name / DATA, title, {})]}
                    for name, title in outputs.artifacts.items()
                },
                "outputFile": str(self.scratch / "executor_output.json"),
            },
        }

    def pack(self) -> None:
        """Put what the component left where SageMaker uploads it from.

        Raises:
            RunError: A declared output parameter was not written.
        """
        path = self.scratch / "executor_output.json"
        written = json.loads(path.read_bytes()) if path.is_file() else {}
        for name in self.template.outputs.artifacts:
            told = (written.get("artifacts", {}).get(name, {}).get("artifacts") or [{}])[0]
            _settle(self.job.outputs / name, told.get("metadata") or {})
        kinds = self.template.outputs.parameters
        if kinds:
            values = {
                name: self._output(name, kind, written.get("parameterValues", {})) for name, kind in kinds.items()
            }
            folder = self.job.outputs / "params"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "params.json").write_text(json.dumps(values, sort_keys=True), encoding="utf-8")

    def _artifact(self, name: str, entry: Artifact) -> dict[str, Any] | None:
        folder = self.job.inputs / name / entry.subfolder
        if not folder.exists():
            if entry.optional:
                return None
            raise RunError(f"the input {name!r} is not there", where=str(folder), fix="look at the step that writes it")
        path = folder / METADATA
        told = json.loads(path.read_bytes()) if path.is_file() else {}
        return _runtime(name, folder / told.get("file", ""), entry.schema_title, told.get("metadata", {}))

    def _value(self, name: str, entry: Parameter) -> Any:
        if not entry.argument:
            return typed(entry.value, entry.type)
        if name not in self.given:
            raise RunError(f"the parameter {name!r} was not given to the container", where=self.template.component)
        try:
            return parse(self.given[name], entry.type)
        except ValueError as error:
            raise RunError(f"the parameter {name!r} is not a {entry.type}", where=self.template.component) from error

    def _output(self, name: str, kind: str, written: dict[str, Any]) -> Any:
        path = self.scratch / "parameters" / name
        if name in written:
            value = typed(written[name], kind)
        elif path.is_file():
            value = parse(path.read_text(encoding="utf-8"), kind)
        else:
            raise RunError(
                f"the output parameter {name!r} was not written",
                where=self.template.component,
                fix="return it on every path",
            )
        return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value


def main(argv: list[str] | None = None) -> int:
    """Run the container's task and return its exit code: 0 done, 2 the input's fault, 75 stopped and resumable."""
    job = Job.here(Path(os.environ.get("ASSAY_ML_ROOT", "/opt/ml")))
    child = Child()
    signal.signal(signal.SIGTERM, child.stop)
    scratch = Path(tempfile.mkdtemp(prefix="assay-task-"))
    try:
        code, message = _run(_parse(argv), job, scratch, child)
    except AssayError as error:
        sys.stderr.write(f"error: {error}\n")
        code, message = 2, str(error)
    except Exception as error:
        traceback.print_exc()
        code, message = 1, f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if code:
        job.message.parent.mkdir(parents=True, exist_ok=True)
        job.message.write_bytes(message.encode()[:MESSAGE_BYTES].decode(errors="ignore").encode())
    return code


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m assay.components.runtime.sagemaker")
    parser.add_argument("--parameter", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--fetch", action="append", default=[], metavar="NAME=S3_URI")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace, job: Job, scratch: Path, child: Child) -> tuple[int, str]:
    """Run the task; return its exit code and why it is not zero."""
    template = _template(job.inputs / "task" / "task.json")
    for name, uri in _pairs(arguments.fetch).items():
        _fetch(uri, job.inputs / name)
    given = {**job.read("hyperparameters.json"), **_pairs(arguments.parameter)}
    task = Task(template, job, given, scratch)
    described = scratch / "executor_input.json"
    described.write_text(json.dumps(task.executor_input()), encoding="utf-8")
    step = ["-m", "assay.components.runtime", "--component", template.component, "--executor_input", f"@{described}"]
    code = child.run([*job.command(), *step], _environment(job, scratch))
    if code == RESUME_EXIT:
        return code, "the step was stopped before it was finished; run again, it goes on from its last checkpoint"
    if code:
        return code, _reason(scratch / "error.json") or child.words(code)
    if job.leads:
        task.pack()
    return 0, ""


def _environment(job: Job, scratch: Path) -> dict[str, str]:
    """Return what a step is told beside its inputs, where the request does not say it."""
    wanted = {"ASSAY_HOME": str(Path(tempfile.gettempdir()) / "assay-home"), "ASSAY_WORK": str(scratch / "work")}
    if job.training:
        wanted["ASSAY_WORK"] = str(job.outputs.with_name("checkpoints"))
    interface = job.read("resourceconfig.json").get("network_interface_name")
    if job.training and interface:
        wanted["NCCL_SOCKET_IFNAME"] = interface
    return {name: value for name, value in wanted.items() if not os.environ.get(name)}


def _template(path: Path) -> Template:
    try:
        return Template.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RunError(f"the task template cannot be read: {error}", where=str(path), fix="compile again") from error


def _pairs(texts: list[str]) -> dict[str, str]:
    """Return `name=value` arguments as a mapping; a value may hold `=`."""
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def _fetch(uri: str, folder: Path) -> None:
    """Download an input that no ProcessingInput was free for.

    Raises:
        RunError: Nothing is there, or S3 refuses.
    """
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        count = s3.download(boto3.client("s3"), uri, folder)
    except (BotoCoreError, ClientError) as error:
        raise RunError(f"S3 refuses: {error}", where=uri, fix="let the job's role read this prefix") from error
    if not count:
        raise RunError("there is no object", where=uri, fix="look at the step that writes it")


def _reason(path: Path) -> str:
    """Return the text of the user's error that the component reported, or nothing."""
    if not path.is_file():
        return ""
    told = json.loads(path.read_bytes())
    return str(AssayError(told["what"], where=told["where"], fix=told["fix"]))


def _settle(folder: Path, metadata: dict[str, Any]) -> None:
    """Move an output from where the component wrote it into its folder, and keep what KFP knows of it."""
    data = folder / DATA
    told: dict[str, Any] = {"metadata": metadata} if metadata else {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METADATA).unlink(missing_ok=True)
    if data.is_dir():
        (data / METADATA).unlink(missing_ok=True)  # a copy of an input brings the input's
        for entry in sorted(data.iterdir()):
            entry.replace(folder / entry.name)
        data.rmdir()
    elif data.is_file():
        data.replace(folder / folder.name)
        told["file"] = folder.name
    if told:
        (folder / METADATA).write_text(json.dumps(told, sort_keys=True), encoding="utf-8")


def _runtime(name: str, path: Path, title: str, metadata: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "uri": str(path), "type": {"schemaTitle": title}, "metadata": metadata}


if __name__ == "__main__":
    sys.exit(main())
