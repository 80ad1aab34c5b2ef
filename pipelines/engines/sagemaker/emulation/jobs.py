"""One Processing or Training job: /opt/ml laid out, inputs down, the container, outputs up, and what Describe says."""

import json
import shutil
import tarfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from assay.components.runtime import s3

from .checkpoints import Checkpoints
from .machines import ROOT, Container, Load, Machine

SYNC_SECONDS = 0.5
"""How often checkpoints are copied; the service does not say how often it does."""
_POLL_SECONDS = 0.05


class JobFailed(Exception):
    """A job that did not end well.

    Args:
        exception: What the service calls it; a RetryPolicy names some of these.
        reason: FailureReason.
    """

    def __init__(self, exception: str, reason: str) -> None:
        super().__init__(reason)
        self.exception, self.reason = exception, reason


class JobStopped(Exception):
    """The execution was told to stop while the job ran."""


@dataclass(frozen=True)
class Fault:
    """Something that happens to one attempt of a step.

    Without `when` the job never starts. With it, the machine is taken away while it runs: a Training on spot instances
    starts again from its checkpoints, any other job fails with `exception`.
    """

    exception: str = "SageMaker.JOB_INTERNAL_ERROR"
    when: Callable[[Path], bool] | None = None
    """Asked again and again with the job's /opt/ml."""
    grace: float = 120.0
    """Seconds between SIGTERM and SIGKILL; 0 is SIGKILL at once."""


@dataclass(frozen=True)
class Site:
    """What all jobs of an execution share."""

    client: Any
    """boto3's S3."""
    folder: Path
    environment: Mapping[str, str]
    """Of every container, beside its request's: how AWS is reached."""
    containers: bool
    images: Mapping[str, str]
    """Image of a request → what this machine's Docker calls it."""
    stopping: threading.Event
    grace: float


class Job(ABC):
    """One job by its request, all expressions resolved."""

    config = f"{ROOT}/config"
    """Where the container reads what it is."""

    def __init__(self, site: Site, name: str, request: dict[str, Any]) -> None:
        self.site, self.name, self.request = site, name, request
        self.folder = site.folder / name
        self.ml = self.folder / "ml"

    def run(self, fault: Fault | None = None) -> dict[str, Any]:
        """Run to the end and return the answer of Describe.

        Raises:
            JobFailed: The container, the data or a fault.
            JobStopped: The execution is stopping.
        """
        if fault and fault.when is None:
            raise JobFailed(fault.exception, "injected before the job started")
        self._prepare()
        try:
            self._watch(fault)
            return self.collect()
        finally:
            shutil.rmtree(self.ml, ignore_errors=True)

    @abstractmethod
    def prepare(self) -> None:
        """Write the configuration and download the inputs."""

    @abstractmethod
    def load(self) -> Load:
        """Return what is to run."""

    @abstractmethod
    def collect(self) -> dict[str, Any]:
        """Upload the outputs and return the answer of Describe."""

    def sync(self) -> None:  # noqa: B027  a Processing job copies nothing meanwhile
        """Copy what is copied while the job runs."""

    def taken_away(self, fault: Fault) -> None:
        """The machine is gone."""
        raise JobFailed(fault.exception, "the machine was taken away")

    def here(self, path: str) -> Path:
        """Return where a path of the container lies on this machine."""
        return self.ml / path.removeprefix(ROOT).lstrip("/")

    def write(self, path: str, value: Any) -> None:
        """Write one of the service's configuration files."""
        target = self.here(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(value, indent=1), encoding="utf-8")

    def download(self, uri: str, path: str) -> None:
        """Bring an input in.

        Raises:
            JobFailed: There is none, as the service says it.
        """
        if not s3.download(self.site.client, uri, self.here(path)):
            raise JobFailed("ClientError", f"ClientError: Data download failed: no S3 objects found under S3 URL {uri}")

    def message(self) -> str:
        """Return what the container said of its failure."""
        for name in ("failure", "message"):
            path = self.ml / "output" / name
            if path.is_file():
                return path.read_text(encoding="utf-8", errors="replace")[:1024]
        return "See job logs for more information"

    def _prepare(self) -> None:
        shutil.rmtree(self.ml, ignore_errors=True)
        (self.ml / "output").mkdir(parents=True)
        resources = {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "eth0"}
        self.write(f"{self.config}/resourceconfig.json", resources)
        self.prepare()

    def _watch(self, fault: Fault | None) -> None:
        machine = (Container if self.site.containers else Machine)(self.load())
        limit = self.request.get("StoppingCondition", {}).get("MaxRuntimeInSeconds")
        started = synced = time.monotonic()
        try:
            while (code := machine.wait(_POLL_SECONDS)) is None:
                now = time.monotonic()
                if now - synced > SYNC_SECONDS:
                    self.sync()
                    synced = now
                if self.site.stopping.is_set():
                    self._end(machine, self.site.grace)
                    raise JobStopped(self.name)
                if fault and fault.when and fault.when(self.ml):
                    self._end(machine, fault.grace)
                    return self.taken_away(fault)
                if limit and now - started > limit:
                    self._end(machine, self.site.grace)
                    raise JobFailed("MaxRuntimeExceeded", f"it ran longer than MaxRuntimeInSeconds ({limit})")
        finally:
            machine.kill()
        self.sync()
        if code:
            raise JobFailed("AlgorithmError", f"AlgorithmError: {self.message()}, exit code: {code}")
        return None

    def _end(self, machine: Machine, grace: float) -> None:
        """Stop a container as the service does; what it saves in its time of grace is copied, a killed one's is not."""
        if grace:
            machine.terminate()
            machine.wait(grace)
            self.sync()
        machine.kill()

    def _load(self, image: str, specification: Mapping[str, Any], environment: Mapping[str, str]) -> Load:
        given = {**self.site.environment, **environment, **self.request.get("Environment", {})}
        command = [*specification.get("ContainerEntrypoint", ()), *(specification.get("ContainerArguments") or ())]
        name = self.site.images.get(image, image)
        return Load(self.name, name, command, given, self.ml, self.folder / "log.txt")


class ProcessingJob(Job):
    """`CreateProcessingJob`."""

    def prepare(self) -> None:
        """Write the configuration, download the inputs, make the output folders."""
        self.write(f"{self.config}/processingjobconfig.json", {"ProcessingJobName": self.name, **self.request})
        for entry in self.request.get("ProcessingInputs", ()):
            self.download(entry["S3Input"]["S3Uri"], entry["S3Input"]["LocalPath"])
        for entry in self._outputs():
            self.here(entry["S3Output"]["LocalPath"]).mkdir(parents=True)

    def load(self) -> Load:
        """Return what is to run."""
        specification = self.request["AppSpecification"]
        return self._load(specification["ImageUri"], specification, {})

    def collect(self) -> dict[str, Any]:
        """Upload the outputs."""
        for entry in self._outputs():
            output = entry["S3Output"]
            s3.upload(self.site.client, self.here(output["LocalPath"]), output["S3Uri"])
        return {**self.request, "ProcessingJobName": self.name, "ProcessingJobStatus": "Completed"}

    def _outputs(self) -> list[dict[str, Any]]:
        return list(self.request.get("ProcessingOutputConfig", {}).get("Outputs", ()))


class TrainingJob(Job):
    """`CreateTrainingJob`."""

    config = f"{ROOT}/input/config"

    def prepare(self) -> None:
        """Write the configuration, download the channels, restore the checkpoints."""
        channels = self.request.get("InputDataConfig", ())
        self.write(f"{self.config}/hyperparameters.json", self.request.get("HyperParameters", {}))
        told = {entry["ChannelName"]: {"TrainingInputMode": "File", "RecordWrapperType": "None"} for entry in channels}
        self.write(f"{self.config}/inputdataconfig.json", told)
        for entry in channels:
            uri = entry["DataSource"]["S3DataSource"]["S3Uri"]
            self.download(uri, f"{ROOT}/input/data/{entry['ChannelName']}")
        (self.ml / "model").mkdir()
        (self.ml / "output" / "data").mkdir()
        (self.ml / "checkpoints").mkdir()
        if self._checkpoints:
            self._checkpoints.restore()

    def load(self) -> Load:
        """Return what is to run; without an entry point of its own an image is started with `train`."""
        specification = self.request["AlgorithmSpecification"]
        wanted = {"ContainerEntrypoint": ["train"], **specification}
        return self._load(specification["TrainingImage"], wanted, {"TRAINING_JOB_NAME": self.name})

    def sync(self) -> None:
        """Copy the checkpoints."""
        if self._checkpoints:
            self._checkpoints.sync()

    def taken_away(self, fault: Fault) -> None:
        """Start again from the checkpoints, if the job runs on spot instances."""
        if not self.request.get("EnableManagedSpotTraining"):
            super().taken_away(fault)
        self._prepare()
        self._watch(None)

    def collect(self) -> dict[str, Any]:
        """Upload the model folder, packed unless the request says NONE."""
        wanted = self.request["OutputDataConfig"]
        place = f"{wanted['S3OutputPath'].rstrip('/')}/{self.name}/output"
        if wanted.get("CompressionType") == "NONE":
            artifacts = f"{place}/model/"
            s3.upload(self.site.client, self.ml / "model", artifacts)
        else:
            artifacts = f"{place}/model.tar.gz"
            self._upload_packed(artifacts)
        return {
            **self.request,
            "TrainingJobName": self.name,
            "TrainingJobStatus": "Completed",
            "ModelArtifacts": {"S3ModelArtifacts": artifacts},
        }

    def _upload_packed(self, uri: str) -> None:
        packed = self.folder / "model.tar.gz"
        with tarfile.open(packed, "w:gz") as archive:
            archive.add(self.ml / "model", arcname=".")
        self.site.client.upload_file(str(packed), *s3.split(uri))
        packed.unlink()

    @cached_property
    def _checkpoints(self) -> Checkpoints | None:
        wanted = self.request.get("CheckpointConfig")
        if not wanted:
            return None
        return Checkpoints(self.site.client, wanted["S3Uri"], self.here(wanted.get("LocalPath", f"{ROOT}/checkpoints")))


JOBS: dict[str, type[Job]] = {"Processing": ProcessingJob, "Training": TrainingJob}
"""Kind of step → its job."""
