"""The request of one job: `CreateProcessingJob` or `CreateTrainingJob`, all that the profile and the task say."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .expressions import Json, get, join
from .profile import Deploy, Job

ENTRYPOINT = ["python", "-m", "assay.components.runtime.sagemaker"]
_DISKS = re.compile(r"ml\.(\w*d\w*|g\d\w*|p3dn|p[4-9]\w*|trn\d\w*)\.")


@dataclass(frozen=True)
class Request:
    """What a request is made of."""

    deploy: Deploy
    job: Job
    name: str
    """Of the step."""
    image: str
    arguments: list[Json]
    """Of the container."""
    sources: Mapping[str, Json]
    """S3 folder of every input."""
    outputs: list[str]
    environment: dict[str, str]
    seconds: int
    """Time limit."""
    item: Json = None
    """In a ForEach, what tells one round's outputs from another's."""

    def build(self) -> dict[str, Json]:
        """Return the request."""
        specific = self._training() if self.job.kind == "training" else self._processing()
        tags = [{"Key": key, "Value": value} for key, value in sorted(self.deploy.tags.items())]
        return {**specific, "Environment": self.environment, **({"Tags": tags} if tags else {})}

    @property
    def run_folder(self) -> Json:
        """Return where the step leaves what this run makes; no part of the cache key, so the run may be named."""
        item = [] if self.item is None else [self.item]
        return join(f"{self.deploy.root}/runs", get("Execution.PipelineExecutionId"), self.name, *item, on="/")

    @property
    def isolated(self) -> bool:
        """Return whether the container has no network."""
        own = self.job.network_isolation
        return self.deploy.network.isolation if own is None else own

    def _processing(self) -> dict[str, Json]:
        cluster = {"InstanceType": self.job.instance_type, "InstanceCount": 1, "VolumeSizeInGB": self.job.volume_gb}
        request: dict[str, Json] = {
            "RoleArn": self.job.role or self.deploy.roles.processing,
            "AppSpecification": {"ImageUri": self.image, **self._command()},
            "ProcessingResources": {"ClusterConfig": {**cluster, **self._volume_key()}},
            "StoppingCondition": {"MaxRuntimeInSeconds": self.seconds},
            "ProcessingInputs": [_processing_input(name, uri) for name, uri in self.sources.items()],
        }
        if self.outputs:
            outputs = [self._processing_output(name) for name in self.outputs]
            request["ProcessingOutputConfig"] = {"Outputs": outputs, **self._output_key()}
        network = {"EnableNetworkIsolation": True} if self.isolated else {}
        if vpc := self._vpc():
            network["VpcConfig"] = vpc
        return {**request, **({"NetworkConfig": network} if network else {})}

    def _processing_output(self, name: str) -> Json:
        # `…/NAME/data`: a prefix names all that begins with it, so no output's may begin with another's.
        folder = join(*self.run_folder["Std:Join"]["Values"], name, "data", on="/")
        return {
            "OutputName": name,
            "S3Output": {
                "S3Uri": folder,
                "LocalPath": f"/opt/ml/processing/output/{name}",
                "S3UploadMode": "EndOfJob",
            },
        }

    def _training(self) -> dict[str, Json]:
        job = self.job
        request: dict[str, Json] = {
            "RoleArn": job.role or self.deploy.roles.training,
            "AlgorithmSpecification": {
                "TrainingImage": self.image,
                "TrainingInputMode": "File",
                **self._command(),
            },
            "InputDataConfig": [_channel(name, uri) for name, uri in self.sources.items()],
            "OutputDataConfig": {"S3OutputPath": self.run_folder, "CompressionType": "NONE", **self._output_key()},
            "ResourceConfig": self._resources(),
            "StoppingCondition": self._stopping(),
        }
        if job.keeps_work:
            folder = join(f"{self.deploy.root}/checkpoints", get("Execution.PipelineExecutionId"), self.name, on="/")
            request["CheckpointConfig"] = {"S3Uri": folder, "LocalPath": "/opt/ml/checkpoints"}
        if job.spot:
            request["EnableManagedSpotTraining"] = True
        if vpc := self._vpc():
            request["VpcConfig"] = vpc
        if self.isolated:
            request["EnableNetworkIsolation"] = True
        if job.instance_count > 1 and self.deploy.network.encrypt_traffic:
            request["EnableInterContainerTrafficEncryption"] = True
        return request

    def _resources(self) -> dict[str, Json]:
        job = self.job
        resources = {
            "InstanceType": job.instance_type,
            "InstanceCount": job.instance_count,
            "VolumeSizeInGB": job.volume_gb,
            **self._volume_key(),
        }
        if job.keep_alive_minutes:
            resources["KeepAlivePeriodInSeconds"] = round(job.keep_alive_minutes * 60)
        return resources

    def _stopping(self) -> dict[str, int]:
        if not self.job.spot:
            return {"MaxRuntimeInSeconds": self.seconds}
        longest = round(self.job.max_wait_minutes * 60) or 2 * self.seconds
        return {"MaxRuntimeInSeconds": self.seconds, "MaxWaitTimeInSeconds": longest}

    def _command(self) -> dict[str, Any]:
        given = {"ContainerArguments": self.arguments} if self.arguments else {}
        return {"ContainerEntrypoint": ENTRYPOINT, **given}

    def _volume_key(self) -> dict[str, str]:
        key = self.deploy.keys.volume
        return {"VolumeKmsKeyId": key} if key and not has_own_disks(self.job.instance_type) else {}

    def _output_key(self) -> dict[str, str]:
        key = self.deploy.keys.output
        return {"KmsKeyId": key} if key else {}

    def _vpc(self) -> Json:
        network = self.deploy.network
        return {"SecurityGroupIds": network.security_groups, "Subnets": network.subnets} if network.subnets else {}


def has_own_disks(instance_type: str) -> bool:
    """Return whether an instance type has NVMe disks of its own: they are encrypted, and take no KMS key."""
    return bool(_DISKS.match(instance_type))


def _processing_input(name: str, uri: Json) -> Json:
    return {
        "InputName": name,
        "S3Input": {
            "S3Uri": uri,
            "LocalPath": f"/opt/ml/processing/input/{name}",
            "S3DataType": "S3Prefix",
            "S3InputMode": "File",
            "S3DataDistributionType": "FullyReplicated",
        },
    }


def _channel(name: str, uri: Json) -> Json:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "InputMode": "File", "DataSource": {"S3DataSource": source}}
