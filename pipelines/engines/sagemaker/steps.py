"""One task as one step: what it is given, its request, its cache, its retries, and its task template."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from assay.components.contracts.errors import RecipeError
from assay.components.runtime.step import IMAGES, image
from assay.pipelines.ir.model import ArtifactSpec, ParameterSpec, Pipeline
from assay.pipelines.ir.portability import Finding
from assay.pipelines.ir.portability_steps import entry_point

from . import template
from .expressions import Json, Names, get, imported, join, parameter
from .graph import Leaf
from .managed import Serverless
from .profile import Deploy, Job
from .request import ENTRYPOINT, Request, has_own_disks
from .values import Constant, Imported, RunFact, Stored, Value, leaves, settle, tasks_of

INPUTS = {"processing": 10, "training": 20}
"""Most inputs of a job, the task template's among them."""
TEMPLATE = "task"
"""Name of the input that holds the task template."""
PARAMETERS = "params"
"""Name of the output, and of the property file, that holds the output parameters."""
_DAY = 86400
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
    """Requests to managed services that are no step, by step: they stand beside the definition."""
    accelerated: list[str] = field(default_factory=list)
    """Names of the steps whose tasks ask for an accelerator."""

    def write(self, leaf: Leaf, name: str, names: Names, taken: Mapping[str, int], item: Json = None) -> Step:
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
        self, writer: Writer, leaf: Leaf, name: str, names: Names, taken: Mapping[str, int], item: Json
    ) -> None:
        self.writer, self.leaf, self.name, self.names, self.item = writer, leaf, name, names, item
        self.where, self.job, self.deploy = f"root/{leaf.path}", writer.jobs[leaf.path], writer.deploy
        self.training = self.job.kind == "training"
        self.most = INPUTS["training" if self.training else "processing"] - 1
        self.declared, self.outputs = leaf.component.input_definitions, leaf.component.output_definitions
        self.parameters = _settled(leaf.parameters, self.declared.parameters, taken)
        self.artifacts = _settled(leaf.artifacts, self.declared.artifacts, taken)
        self.implied: set[str] = set()
        self.needed: set[str] = set()

    def step(self) -> Step:
        self._check()
        if self.leaf.container.resources.accelerator:
            self.writer.accelerated.append(self.name)
        arguments, template_ = self._arguments(), self._template()
        request = self._request(arguments, template_)
        body: dict[str, Json] = {
            "Name": self.name,
            "Type": "Training" if self.training else "Processing",
            "Arguments": self._managed(request) if self.job.managed else request.build(),
        }
        if self.outputs.parameters:
            file = {"PropertyFileName": PARAMETERS, "OutputName": PARAMETERS, "FilePath": f"{PARAMETERS}.json"}
            body["PropertyFiles"] = [file]
        if self._cached():
            body["CacheConfig"] = {"Enabled": True, "ExpireAfter": f"P{self.deploy.cache_days}D"}
        if self.leaf.task.retry_policy.max_retry_count:
            body["RetryPolicies"] = self._retries()
        self.needed |= {self.names[path] for path in self.leaf.after if path in self.names}
        return Step(body, frozenset(self.implied), frozenset(self.needed - self.implied), template_)

    def _check(self) -> None:
        required = [name for name, spec in self.declared.parameters.items() if not spec.is_optional]
        required += [name for name, entry in self.declared.artifacts.items() if not entry.is_optional]
        for name in sorted(set(required) - self.parameters.keys() - self.artifacts.keys()):
            raise self._refuse(f"the input {name!r} has no value", "give it one")
        if self.training and self.outputs.parameters:
            raise self._refuse(
                f"a Training job hands on no parameters ({', '.join(sorted(self.outputs.parameters))})",
                "make it a Processing job (kind: processing), or let it write an artifact",
            )
        count = len(self.outputs.artifacts) + bool(self.outputs.parameters)
        if not self.training and count > INPUTS["processing"]:
            raise self._refuse(f"it has {count} outputs, and a Processing job has at most 10", "split the task")
        if TEMPLATE in self.artifacts or PARAMETERS in self.outputs.artifacts:
            raise self._refuse("the artifact names `task` (input) and `params` (output) are taken", "rename it")

    # ---- what the container is given

    def _arguments(self) -> list[Json]:
        """Return the container's arguments; a text that is known after all becomes a constant of the template."""
        arguments: list[Json] = []
        for name, value in self.parameters.items():
            if isinstance(value, Constant):
                continue
            text = join(*parameter(value, self.names, self.name, f"{self.where}: {name}"))
            if isinstance(text, str):
                self.parameters[name] = Constant(text)
                continue
            parts = text["Std:Join"]["Values"] if "Std:Join" in text else [text]
            arguments += ["--parameter", join(f"{name}=", *parts)]
            self.needed |= {self.names[task] for task in tasks_of(value)}
        for name in [*self.artifacts][self.most :]:
            arguments += ["--fetch", join(f"{name}=", self._uri(name))]
        return arguments

    def _template(self) -> bytes:
        found = entry_point(self.leaf.container)
        if found is None:
            raise self._refuse("its container does not run a step of ours", "make it a component with @step")
        folders = {name: self._subfolder(value) for name, value in self.artifacts.items()}
        return template.build(self.leaf.component, found, self.parameters, folders)

    def _subfolder(self, value: Value) -> str:
        """Return where an artifact lies in what its producer left: a Training job leaves all of them in one folder."""
        ours = isinstance(value, Stored) and self.writer.jobs[value.task].kind == "training"
        return value.output if ours and isinstance(value, Stored) else ""

    def _uri(self, name: str) -> Json:
        """Return where an input lies: a property of its producer, which a cache hit keeps right."""
        value = self.artifacts[name]
        if isinstance(value, Imported):
            self.needed |= {self.names[task] for task in tasks_of(value)}
            return imported(value, self.names, f"{self.where}: {name}")
        if not isinstance(value, Stored):
            raise self._refuse(f"the input {name!r} is a list of artifacts", "let one step take each of them")
        producer = self.names[value.task]
        self.implied.add(producer)
        if self.writer.jobs[value.task].kind == "training":
            return get(f"Steps.{producer}.ModelArtifacts.S3ModelArtifacts")
        return get(f"Steps.{producer}.ProcessingOutputConfig.Outputs['{value.output}'].S3Output.S3Uri")

    # ---- what it runs on

    def _request(self, arguments: list[Json], template_: bytes) -> Request:
        inputs = {TEMPLATE: f"{self.deploy.root}/tasks/{template.digest(template_)}/"}
        inputs |= {name: self._uri(name) for name in [*self.artifacts][: self.most]}
        outputs = sorted(self.outputs.artifacts) + [PARAMETERS] * bool(self.outputs.parameters)
        request = Request(
            self.deploy,
            self.job,
            self.name,
            self._image(),
            arguments,
            inputs,
            outputs,
            self._environment(),
            self._seconds(),
            self.item,
        )
        self._check_request(request)
        return request

    def _check_request(self, request: Request) -> None:
        if request.isolated and len(self.artifacts) > self.most:
            raise self._refuse(
                "it fetches inputs itself, and is cut off from the network",
                "set network_isolation: false for this task",
            )
        if self.job.spot and 0 < self.job.max_wait_minutes * 60 < request.seconds:
            raise self._refuse(
                f"max_wait_minutes is below its time limit of {request.seconds / 60:g} minutes", "raise it"
            )
        if self.deploy.keys.volume and has_own_disks(self.job.instance_type):
            self._tell("note", f"{self.job.instance_type} encrypts its own disks; it takes no volume key")

    def _image(self) -> str:
        given = self.leaf.container.image
        role = next((role for role in IMAGES if image(role) == given), "")
        return str(self.job.image or getattr(self.deploy.images, role, "") or given)

    def _environment(self) -> dict[str, str]:
        deploy = self.deploy
        wanted = {
            "ASSAY_REGISTRY": deploy.registry,
            "ASSAY_WORK": "/opt/ml/checkpoints" if self.training else "",
            "MLFLOW_TRACKING_URI": deploy.mlflow_tracking_uri,
            "MLFLOW_EXPERIMENT_NAME": deploy.mlflow_experiment or self.writer.pipeline.pipeline_info.name,
        }
        own = {entry.name: entry.value for entry in self.leaf.container.env}
        for name in sorted(name for name, value in own.items() if "{{$" in value):
            raise self._refuse(f"the variable {name} depends on the run", "pass it as a parameter", "env")
        known = {name: value for name, value in wanted.items() if value}
        return dict(sorted({**deploy.environment, **known, **own, **self.job.environment}.items()))

    def _seconds(self) -> int:
        platform = self.writer.pipeline.platform("kubernetes", self.leaf.component.executor_label)
        asked = platform.get("activeDeadlineSeconds") or _DAY
        return round(self.job.max_runtime_minutes * 60) or int(asked)

    def _managed(self, request: Request) -> dict[str, Json]:
        """Return the arguments of a step that a managed service takes over, or keep that service's request."""
        managed = self.job.managed
        assert managed is not None
        if not self.training:
            raise self._refuse("only a Training job can be handed to a managed service", "set kind: training")
        arguments = request.build()
        if isinstance(managed, Serverless):
            self.implied.clear()
            outputs = ", ".join(sorted(self.outputs.artifacts))
            what = f"SageMaker's serverless customization takes it over, and leaves no {outputs} for the steps after it"
            self._tell("warning", what, "let those steps read that service's output, or leave `managed` out")
            tags = {"Tags": arguments["Tags"]} if "Tags" in arguments else {}
            return {**managed.request(arguments["RoleArn"], request.run_folder), **tags}
        if managed.by == "bedrock":
            told = managed.request(self.name, f"{self.deploy.root}/managed/{self.name}/")
        else:
            told = managed.manifest(self.name.lower(), request.image, self.job.instance_type, ENTRYPOINT[1:])
        self.writer.requests[self.name] = told
        self._tell("note", f"the request to {managed.by} stands beside the definition, which keeps the Training job")
        return arguments

    # ---- cache and retries

    def _cached(self) -> bool:
        wanted = self.leaf.task.caching_options.enable_cache and self.deploy.cache_days > 0 and self.item is None
        if wanted and self.training and self.job.keeps_work:
            # The prefix is in the cache key and must not be shared by runs whose inputs differ.
            self._tell("warning", "checkpoints switch its cache off: their prefix belongs to one run", "leave spot out")
            return False
        facts = [leaf for value in self.parameters.values() for leaf in leaves(value) if isinstance(leaf, RunFact)]
        return wanted and not facts

    def _retries(self) -> list[Json]:
        policy = self.leaf.task.retry_policy
        shared = {
            "IntervalSeconds": max(1, round(policy.delay(1))),
            "BackoffRate": max(1.0, policy.backoff_factor),
            "MaxAttempts": min(policy.max_retry_count, 20),
        }
        return [{"ExceptionType": kinds, **shared} for kinds in _RETRIED]

    def _tell(self, level: Literal["warning", "note"], what: str, fix: str = "") -> None:
        self.writer.findings.append(Finding(level, self.where, what, fix))

    def _refuse(self, what: str, fix: str, part: str = "") -> RecipeError:
        return RecipeError(what, where=f"{self.where}: {part}" if part else self.where, fix=fix)


def _settled(
    given: Mapping[str, Value],
    declared: Mapping[str, ParameterSpec] | Mapping[str, ArtifactSpec],
    taken: Mapping[str, int],
) -> dict[str, Value]:
    """Return the values in these branches; an optional one that belongs to another branch is left out."""
    found = {}
    for name, value in sorted(given.items()):
        try:
            found[name] = settle(value, taken)
        except LookupError:
            if not declared[name].is_optional:
                raise
    return found
