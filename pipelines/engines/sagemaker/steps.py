"""One task as one step: the request of its Processing or Training job, and its task template."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from assay.components.contracts.errors import RecipeError
from assay.components.runtime.step import IMAGES, image
from assay.pipelines.ir.model import Container, Pipeline
from assay.pipelines.ir.portability import Finding, entry_point

from .expressions import Json, Names, get, imported, join, parameter
from .graph import Leaf
from .profile import Deploy, Job
from .values import Constant, Imported, RunFact, Stored, Value, leaves, settle

ENTRYPOINT = ["python", "-m", "assay.components.runtime.sagemaker"]
INPUTS = {"processing": 10, "training": 20}
"""Most inputs of a job, the task template's among them."""
TEMPLATE = "task"
"""Name of the input that holds the task template."""
PARAMETERS = "params"
"""Name of the output, and of the property file, that holds the output parameters."""
_DAY = 86400
_DISKS = re.compile(r"ml\.(\w*d\w*|g\d\w*|p3dn|p[4-9]\w*|trn\d\w*|inf\d\w*)\.")
"""Instance types with NVMe disks of their own, which take no KMS key."""
_RETRIED = (
    ["Step.SERVICE_FAULT", "Step.THROTTLING"],
    ["SageMaker.JOB_INTERNAL_ERROR", "SageMaker.CAPACITY_ERROR", "SageMaker.RESOURCE_LIMIT"],
)
"""What the service can try again: its own faults, never those of the code."""


@dataclass(frozen=True)
class Step:
    """A step of the definition, and what it needs that the definition does not hold."""

    body: dict[str, Json]
    implied: frozenset[str]
    """Names of the steps that it waits for because it reads their properties."""
    needed: frozenset[str]
    """Names of the other steps that it waits for."""
    template: bytes = b""


@dataclass
class Writer:
    """Writes the steps of one pipeline."""

    pipeline: Pipeline
    deploy: Deploy
    jobs: Mapping[str, Job]
    """By path of the task."""
    findings: list[Finding] = field(default_factory=list)
    requests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Requests to other services, by step: they stand beside the definition."""

    def write(self, leaf: Leaf, name: str, names: Names, taken: Mapping[str, int], item: Json | None = None) -> Step:
        """Return the step of a task.

        Args:
            leaf: The task.
            name: The step's name.
            names: Of the steps that are visible here, by path.
            taken: Branches that the step is in.
            item: In a ForEach, what tells one round's outputs from another's.

        Raises:
            RecipeError: SageMaker cannot run the task as it is asked for.
        """
        return _Task(self, leaf, name, names, taken, item).step()


class _Task:
    """One step in the making."""

    def __init__(
        self, writer: Writer, leaf: Leaf, name: str, names: Names, taken: Mapping[str, int], item: Json | None
    ) -> None:
        self.writer, self.deploy, self.leaf, self.name, self.names, self.item = (
            writer,
            writer.deploy,
            leaf,
            name,
            names,
            item,
        )
        self.where = f"root/{leaf.path}"
        self.job = writer.jobs[leaf.path]
        self.training = self.job.kind == "training"
        self.parameters = self._settled(leaf.parameters, taken, leaf.component.input_definitions.parameters)
        self.artifacts = self._settled(leaf.artifacts, taken, leaf.component.input_definitions.artifacts)
        self.implied: set[str] = set()
        self.needed: set[str] = set()

    def step(self) -> Step:
        self._check()
        arguments, template = self._arguments()
        body: dict[str, Json] = {"Name": self.name, "Type": "Training" if self.training else "Processing"}
        body["Arguments"] = self._training(arguments) if self.training else self._processing(arguments)
        if self.job.managed:
            self._manage(body)
        if self.leaf.component.output_definitions.parameters:
            body["PropertyFiles"] = [
                {"PropertyFileName": PARAMETERS, "OutputName": PARAMETERS, "FilePath": f"{PARAMETERS}.json"}
            ]
        if self._cached():
            body["CacheConfig"] = {"Enabled": True, "ExpireAfter": f"P{self.deploy.cache_days}D"}
        if self.leaf.task.retry_policy.max_retry_count:
            body["RetryPolicies"] = self._retries()
        self.needed |= {self.names[path] for path in self.leaf.after if path in self.names}
        return Step(body, frozenset(self.implied), frozenset(self.needed - self.implied), template)

    # ---- what it is given

    def _settled(
        self, given: Mapping[str, Value], taken: Mapping[str, int], declared: Mapping[str, Any]
    ) -> dict[str, Value]:
        found = {}
        for name, value in sorted(given.items()):
            try:
                found[name] = settle(value, taken)
            except LookupError:
                if not declared[name].is_optional:
                    raise
        return found

    def _check(self) -> None:
        declared = self.leaf.component.input_definitions
        required = [name for name, spec in declared.parameters.items() if not spec.is_optional]
        required += [name for name, entry in declared.artifacts.items() if not entry.is_optional]
        for name in sorted(set(required) - self.parameters.keys() - self.artifacts.keys()):
            raise self._refuse(f"the input {name!r} has no value", "give it one")
        outputs = self.leaf.component.output_definitions
        if self.training and outputs.parameters:
            raise self._refuse(
                f"a Training job hands on no parameters ({', '.join(sorted(outputs.parameters))})",
                "make it a Processing job (kind: processing), or let it write an artifact",
            )
        count = len(outputs.artifacts) + bool(outputs.parameters)
        if not self.training and count > 10:
            raise self._refuse(f"it has {count} outputs, and a Processing job has at most 10", "split the task")
        if TEMPLATE in declared.artifacts or PARAMETERS in outputs.artifacts:
            raise self._refuse("the artifact names `task` (input) and `params` (output) are taken", "rename it")

    def _arguments(self) -> tuple[list[Json], bytes]:
        """Return the container's arguments and the task template."""
        arguments: list[Json] = []
        values: dict[str, Json] = {}
        declared = self.leaf.component.input_definitions
        for name, value in self.parameters.items():
            kind = declared.parameters[name].parameter_type
            parts = (
                [] if isinstance(value, Constant) else parameter(value, self.names, self.name, f"{self.where}: {name}")
            )
            text = join(*parts)
            if isinstance(value, Constant) or isinstance(text, str):
                values[name] = {"type": kind, "value": value.value if isinstance(value, Constant) else text}
                continue
            values[name] = {"type": kind, "argument": True}
            arguments += ["--parameter", join(f"{name}=", *parts)]
            self.needed |= {self.names[leaf.task] for leaf in leaves(value) if hasattr(leaf, "task")}
        entries = {}
        for name, value in self.artifacts.items():
            spec = declared.artifacts[name]
            entries[name] = {
                "schema_title": spec.artifact_type.schema_title,
                "subfolder": self._subfolder(value),
                "optional": spec.is_optional,
            }
        for name in [*self.artifacts][INPUTS[self.job.kind or "processing"] - 1 :]:
            arguments += ["--fetch", join(f"{name}=", self._uri(self.artifacts[name], name))]
        outputs = self.leaf.component.output_definitions
        component, digest = self._entry_point()
        template = {
            "component": component,
            "code_digest": digest,
            "parameters": values,
            "artifacts": entries,
            "outputs": {
                "parameters": {name: spec.parameter_type for name, spec in outputs.parameters.items()},
                "artifacts": {name: spec.artifact_type.schema_title for name, spec in outputs.artifacts.items()},
            },
        }
        self.template = (json.dumps(template, sort_keys=True, indent=1) + "\n").encode()
        return arguments, self.template

    def _entry_point(self) -> tuple[str, str]:
        found = entry_point(self.leaf.container)
        if found is None:
            raise self._refuse("its container does not run a step of ours", "make it a component with @step")
        return found

    def _subfolder(self, value: Value) -> str:
        if isinstance(value, Stored) and self.writer.jobs[value.task].kind == "training":
            return value.output
        return ""

    def _uri(self, value: Value, name: str) -> Json:
        """Return where an artifact lies: a property of its producer, which a cache hit keeps right."""
        if isinstance(value, Imported):
            return imported(value, self.names, f"{self.where}: {name}")
        if not isinstance(value, Stored):
            raise self._refuse(f"the input {name!r} is a list of artifacts", "let one step take each of them")
        producer = self.names[value.task]
        self.implied.add(producer)
        if self.writer.jobs[value.task].kind == "training":
            return get(f"Steps.{producer}.ModelArtifacts.S3ModelArtifacts")
        return get(f"Steps.{producer}.ProcessingOutputConfig.Outputs['{value.output}'].S3Output.S3Uri")

    def _sources(self) -> dict[str, Json]:
        """Return the S3 folder of every input: the template's first, then the artifacts that fit."""
        digest = hashlib.sha256(self.template).hexdigest()
        first = [*self.artifacts][: INPUTS[self.job.kind or "processing"] - 1]
        return {
            TEMPLATE: f"{self.deploy.root}/tasks/{digest}/",
            **{name: self._uri(self.artifacts[name], name) for name in first},
        }

    # ---- the two kinds of job

    def _processing(self, arguments: list[Json]) -> dict[str, Json]:
        job, keys = self.job, self.deploy.keys
        cluster = {"InstanceType": job.instance_type, "InstanceCount": 1, "VolumeSizeInGB": job.volume_gb}
        request: dict[str, Json] = {
            "RoleArn": job.role or self.deploy.roles.processing,
            "AppSpecification": {"ImageUri": self._image(), **_command(arguments)},
            "ProcessingResources": {"ClusterConfig": {**cluster, **self._volume_key()}},
            "StoppingCondition": {"MaxRuntimeInSeconds": self._seconds()},
            "Environment": self._environment(),
            "ProcessingInputs": [
                {
                    "InputName": name,
                    "S3Input": {
                        "S3Uri": uri,
                        "LocalPath": f"/opt/ml/processing/input/{name}",
                        "S3DataType": "S3Prefix",
                        "S3InputMode": "File",
                        "S3DataDistributionType": "FullyReplicated",
                    },
                }
                for name, uri in self._sources().items()
            ],
        }
        declared = self.leaf.component.output_definitions
        outputs = sorted(declared.artifacts) + [PARAMETERS] * bool(declared.parameters)
        if outputs:
            request["ProcessingOutputConfig"] = {
                "Outputs": [self._output(name) for name in outputs],
                **({"KmsKeyId": keys.output} if keys.output else {}),
            }
        vpc, isolated = self._vpc(), self._isolated()
        if vpc or isolated:
            network = {"EnableNetworkIsolation": True} if isolated else {}
            request["NetworkConfig"] = {**network, **({"VpcConfig": vpc} if vpc else {})}
        return {**request, **self._tags()}

    def _output(self, name: str) -> Json:
        # `…/NAME/data`: a prefix names all that begins with it, so no output's may begin with another's.
        return {
            "OutputName": name,
            "S3Output": {
                "S3Uri": join(*self._run_folder(), name, "data", on="/"),
                "LocalPath": f"/opt/ml/processing/output/{name}",
                "S3UploadMode": "EndOfJob",
            },
        }

    def _training(self, arguments: list[Json]) -> dict[str, Json]:
        job, keys = self.job, self.deploy.keys
        resources: dict[str, Json] = {
            "InstanceType": job.instance_type,
            "InstanceCount": job.instance_count,
            "VolumeSizeInGB": job.volume_gb,
            **self._volume_key(),
        }
        if job.keep_alive_minutes:
            resources["KeepAlivePeriodInSeconds"] = round(job.keep_alive_minutes * 60)
        request: dict[str, Json] = {
            "RoleArn": job.role or self.deploy.roles.training,
            "AlgorithmSpecification": {
                "TrainingImage": self._image(),
                "TrainingInputMode": "File",
                **_command(arguments),
            },
            "InputDataConfig": [
                {
                    "ChannelName": name,
                    "InputMode": "File",
                    "DataSource": {
                        "S3DataSource": {
                            "S3DataType": "S3Prefix",
                            "S3Uri": uri,
                            "S3DataDistributionType": "FullyReplicated",
                        }
                    },
                }
                for name, uri in self._sources().items()
            ],
            "OutputDataConfig": {
                "S3OutputPath": join(*self._run_folder(), on="/"),
                "CompressionType": "NONE",
                **({"KmsKeyId": keys.output} if keys.output else {}),
            },
            "ResourceConfig": resources,
            "StoppingCondition": self._stopping(),
            "Environment": {"ASSAY_WORK": "/opt/ml/checkpoints", **self._environment()},
        }
        if self._checkpointed():
            folder = join(f"{self.deploy.root}/checkpoints", get("Execution.PipelineExecutionId"), self.name, on="/")
            request["CheckpointConfig"] = {"S3Uri": folder, "LocalPath": "/opt/ml/checkpoints"}
        if job.spot:
            request["EnableManagedSpotTraining"] = True
        if vpc := self._vpc():
            request["VpcConfig"] = vpc
        if self._isolated():
            request["EnableNetworkIsolation"] = True
        if job.instance_count > 1 and self.deploy.network.encrypt_traffic:
            request["EnableInterContainerTrafficEncryption"] = True
        return {**request, **self._tags()}

    def _manage(self, body: dict[str, Json]) -> None:
        """Put a managed service in the place of the job, or its request beside the definition."""
        managed = self.job.managed
        folder = f"{self.deploy.root}/managed/{self.name}"
        if managed is None or not self.training:
            raise self._refuse("only a Training step can be handed to a managed service", "set kind: training")
        if managed.by == "serverless":
            run = join(*self._run_folder(), on="/")
            body["Arguments"] = {**managed.request(body["Arguments"]["RoleArn"], run), **self._tags()}
            self.implied.clear()
            self._tell("note", "managed by SageMaker's serverless customization; its output is that service's", "")
            return
        if managed.by == "bedrock":
            self.writer.requests[self.name] = managed.request(self.name, folder)
        else:
            command = ["-m", "assay.components.runtime.sagemaker"]
            self.writer.requests[self.name] = managed.manifest(
                self.name.lower(), self._image(), self.job.instance_type, command
            )
        self._tell(
            "note",
            f"the request to {managed.by} stands beside the definition; the definition keeps the Training job",
            "submit the request yourself, or leave `managed` out",
        )

    # ---- parts of a request

    def _run_folder(self) -> list[Json]:
        item = [self.item] if self.item is not None else []
        return [f"{self.deploy.root}/runs", get("Execution.PipelineExecutionId"), self.name, *item]

    def _image(self) -> str:
        given = self.leaf.container.image
        role = next((role for role in IMAGES if image(role) == given), "")
        return str(self.job.image or getattr(self.deploy.images, role, "") or given)

    def _environment(self) -> dict[str, str]:
        deploy = self.deploy
        wanted = {
            "ASSAY_REGISTRY": deploy.registry,
            "MLFLOW_TRACKING_URI": deploy.mlflow_tracking_uri,
            "MLFLOW_EXPERIMENT_NAME": deploy.mlflow_experiment or self.writer.pipeline.pipeline_info.name,
        }
        own = {entry.name: entry.value for entry in self.leaf.container.env}
        for name, value in own.items():
            if "{{$" in value:
                raise self._refuse(f"the variable {name} depends on the run", "pass it as a parameter", "env")
        known = {name: value for name, value in wanted.items() if value}
        return dict(sorted({**deploy.environment, **known, **own, **self.job.environment}.items()))

    def _seconds(self) -> int:
        platform = self.writer.pipeline.platform("kubernetes", self.leaf.component.executor_label)
        asked = platform.get("activeDeadlineSeconds") or _DAY
        return round(self.job.max_runtime_minutes * 60) or int(asked)

    def _stopping(self) -> dict[str, int]:
        seconds = self._seconds()
        if not self.job.spot:
            return {"MaxRuntimeInSeconds": seconds}
        longest = round(self.job.max_wait_minutes * 60) or 2 * seconds
        if longest < seconds:
            raise self._refuse(
                f"max_wait_minutes ({longest / 60:g}) is below the time limit ({seconds / 60:g} minutes)", "raise it"
            )
        return {"MaxRuntimeInSeconds": seconds, "MaxWaitTimeInSeconds": longest}

    def _checkpointed(self) -> bool:
        return self.job.checkpoints or self.job.spot

    def _cached(self) -> bool:
        wanted = self.leaf.task.caching_options.enable_cache and self.deploy.cache_days > 0 and self.item is None
        if not wanted:
            return False
        if self.training and self._checkpointed():
            # The prefix is in the cache key and must not be shared by runs whose inputs differ.
            self._tell("warning", "checkpoints switch its cache off: their prefix belongs to one run", "leave spot out")
            return False
        facts = [leaf for value in self.parameters.values() for leaf in leaves(value) if isinstance(leaf, RunFact)]
        return all(fact.name == "pipeline_task_name" for fact in facts)

    def _retries(self) -> list[Json]:
        policy = self.leaf.task.retry_policy
        shared = {
            "IntervalSeconds": max(1, round(policy.delay(1))),
            "BackoffRate": max(1.0, policy.backoff_factor),
            "MaxAttempts": min(policy.max_retry_count, 20),
        }
        return [{"ExceptionType": kinds, **shared} for kinds in _RETRIED]

    def _volume_key(self) -> dict[str, str]:
        key = self.deploy.keys.volume
        if key and _DISKS.match(self.job.instance_type):
            self._tell("note", f"{self.job.instance_type} encrypts its own disks; it takes no volume key", "")
            return {}
        return {"VolumeKmsKeyId": key} if key else {}

    def _vpc(self) -> dict[str, list[str]]:
        network = self.deploy.network
        return {"SecurityGroupIds": network.security_groups, "Subnets": network.subnets} if network.subnets else {}

    def _isolated(self) -> bool:
        isolated = self.job.network_isolation
        isolated = self.deploy.network.isolation if isolated is None else isolated
        if isolated and len(self.artifacts) >= INPUTS[self.job.kind or "processing"]:
            raise self._refuse(
                "it fetches inputs itself, and is cut off from the network",
                "set network_isolation: false for this task",
            )
        return isolated

    def _tags(self) -> dict[str, Json]:
        tags = [{"Key": key, "Value": value} for key, value in sorted(self.deploy.tags.items())]
        return {"Tags": tags} if tags else {}

    def _tell(self, level: Any, what: str, fix: str) -> None:
        self.writer.findings.append(Finding(level, self.where, what, fix))

    def _refuse(self, what: str, fix: str, part: str = "") -> RecipeError:
        return RecipeError(what, where=f"{self.where}: {part}" if part else self.where, fix=fix)


def _command(arguments: list[Json]) -> dict[str, Json]:
    given = {"ContainerArguments": arguments} if arguments else {}
    return {"ContainerEntrypoint": ENTRYPOINT, **given}


def accelerated(container: Container) -> bool:
    """Return whether a container asks for an accelerator."""
    return container.resources.accelerator is not None
