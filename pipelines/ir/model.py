"""The compiled pipeline (KFP IR, schema 2.1.0) as typed, frozen objects.

The names are those of `pipeline_spec.proto`. A key that is not in that file, or a reference that leads nowhere, is a
`RecipeError` naming its place: an engine that skips what it does not know runs another pipeline than was written.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from assay.components.contracts.artifacts import digest_of
from assay.components.contracts.errors import RecipeError

from . import cel, placeholders

ParameterType = Literal[
    "STRING", "NUMBER_INTEGER", "NUMBER_DOUBLE", "BOOLEAN", "LIST", "STRUCT", "TASK_FINAL_STATUS", "TASK_CONFIG"
]
_SELECTOR = re.compile(r'parseJson\(string_value\)\["(.*)"\]', re.DOTALL)
_UNITS = {"m": 1e-3, "": 1.0}


class Spec(BaseModel):
    """Base of every message: keys in camel case, none unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel)


class ArtifactType(Spec):
    """A schema such as `system.Dataset`."""

    schema_title: str = ""
    schema_version: str = ""
    schema_uri: str = ""
    instance_schema: str = ""


class ParameterSpec(Spec):
    """A declared parameter."""

    parameter_type: ParameterType
    default_value: Any = None
    is_optional: bool = False
    description: str = ""
    literals: list[Any] = []


class ArtifactSpec(Spec):
    """A declared artifact, or list of artifacts."""

    artifact_type: ArtifactType
    is_artifact_list: bool = False
    is_optional: bool = False
    description: str = ""
    metadata: dict[str, Any] = {}


class Definitions(Spec):
    """The inputs or the outputs of a component."""

    parameters: dict[str, ParameterSpec] = {}
    artifacts: dict[str, ArtifactSpec] = {}


class ParameterOutput(Spec):
    """A parameter that a sibling task writes."""

    producer_task: str
    output_parameter_key: str


class ArtifactOutput(Spec):
    """An artifact that a sibling task writes."""

    producer_task: str
    output_artifact_key: str


class FinalStatus(Spec):
    """The final status of a sibling task, for an exit handler."""

    producer_task: str


class RuntimeValue(Spec):
    """A constant, or the name of a parameter that holds the value."""

    constant: Any = None
    runtime_parameter: str = ""


class ParameterInput(Spec):
    """Where a task takes a parameter from; exactly one source."""

    runtime_value: RuntimeValue | None = None
    task_output_parameter: ParameterOutput | None = None
    component_input_parameter: str | None = None
    task_final_status: FinalStatus | None = None
    parameter_expression_selector: str = ""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = (
            self.runtime_value,
            self.task_output_parameter,
            self.component_input_parameter,
            self.task_final_status,
        )
        if sum(source is not None for source in sources) != 1:
            raise ValueError("wanted exactly one source of the value")
        if self.parameter_expression_selector and not _SELECTOR.fullmatch(self.parameter_expression_selector):
            raise ValueError(f"unknown parameterExpressionSelector {self.parameter_expression_selector!r}")
        return self

    @property
    def producer(self) -> str | None:
        """The sibling task the value comes from."""
        source = self.task_output_parameter or self.task_final_status
        return source.producer_task if source else None

    @property
    def item_key(self) -> str | None:
        """The key to take from a loop item that is a mapping (`item.key`)."""
        match = _SELECTOR.fullmatch(self.parameter_expression_selector)
        return match[1] if match else None


class ArtifactInput(Spec):
    """Where a task takes an artifact from; exactly one source."""

    task_output_artifact: ArtifactOutput | None = None
    component_input_artifact: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.task_output_artifact is None) == (self.component_input_artifact is None):
            raise ValueError("wanted exactly one source of the artifact")
        return self


class Inputs(Spec):
    """The inputs of a task."""

    parameters: dict[str, ParameterInput] = {}
    artifacts: dict[str, ArtifactInput] = {}


class TaskInfo(Spec):
    """The display name."""

    name: str = ""


class ComponentRef(Spec):
    """The component a task runs."""

    name: str


class CachingOptions(Spec):
    """Whether a result may come from the cache; `{}` is off."""

    enable_cache: bool = False
    cache_key: str = ""


class RetryPolicy(Spec):
    """How often a failed task is tried again, and after how long."""

    max_retry_count: int = 0
    backoff_duration: str = "0s"
    backoff_factor: float = 2.0
    backoff_max_duration: str = "3600s"

    def delay(self, failures: int) -> float:
        """Return the seconds to wait after the given number of failures (from 1)."""
        first, longest = (float(text.removesuffix("s")) for text in (self.backoff_duration, self.backoff_max_duration))
        return min(first * self.backoff_factor ** (failures - 1), longest)


class TriggerPolicy(Spec):
    """When a task runs: a CEL condition, or a strategy other than "all upstream tasks succeeded"."""

    condition: str = ""
    strategy: Literal[
        "TRIGGER_STRATEGY_UNSPECIFIED", "ALL_UPSTREAM_TASKS_SUCCEEDED", "ALL_UPSTREAM_TASKS_COMPLETED"
    ] = "TRIGGER_STRATEGY_UNSPECIFIED"

    @cached_property
    def expression(self) -> cel.Expression | None:
        """The parsed condition."""
        return cel.parse(self.condition) if self.condition else None


class Items(Spec):
    """What a loop iterates over: JSON text, or an input."""

    raw: str = ""
    input_parameter: str = ""
    input_artifact: str = ""


class Iterator_(Spec):  # noqa: N801  typing.Iterator has the name
    """A loop."""

    items: Items
    item_input: str


class IteratorPolicy(Spec):
    """How many iterations may run at once; 0 is no limit."""

    parallelism_limit: int = 0


class Task(Spec):
    """One node of a DAG."""

    component_ref: ComponentRef
    task_info: TaskInfo = TaskInfo()
    inputs: Inputs = Inputs()
    dependent_tasks: list[str] = []
    caching_options: CachingOptions = CachingOptions()
    trigger_policy: TriggerPolicy = TriggerPolicy()
    retry_policy: RetryPolicy = RetryPolicy()
    parameter_iterator: Iterator_ | None = None
    artifact_iterator: Iterator_ | None = None
    iterator_policy: IteratorPolicy = IteratorPolicy()

    @cached_property
    def upstream(self) -> frozenset[str]:
        """The sibling tasks it waits for."""
        artifacts = (entry.task_output_artifact for entry in self.inputs.artifacts.values())
        producers = {entry.producer for entry in self.inputs.parameters.values() if entry.producer}
        return frozenset(self.dependent_tasks) | producers | {entry.producer_task for entry in artifacts if entry}

    @property
    def needs_success(self) -> bool:
        """Whether it runs only after every upstream task succeeded."""
        return self.trigger_policy.strategy != "ALL_UPSTREAM_TASKS_COMPLETED"


class ParameterSelector(Spec):
    """A parameter of a task inside the DAG."""

    producer_subtask: str
    output_parameter_key: str


class ParameterSelectors(Spec):
    """Parameters of which at most one is written."""

    parameter_selectors: list[ParameterSelector] = []


class DagParameter(Spec):
    """Where a parameter of a DAG comes from."""

    value_from_parameter: ParameterSelector | None = None
    value_from_oneof: ParameterSelectors | None = None

    @property
    def selectors(self) -> list[tuple[str, str]]:
        """Candidates as (task, output)."""
        one = [self.value_from_parameter] if self.value_from_parameter else []
        several = self.value_from_oneof.parameter_selectors if self.value_from_oneof else []
        return [(entry.producer_subtask, entry.output_parameter_key) for entry in one + several]


class ArtifactSelector(Spec):
    """An artifact of a task inside the DAG."""

    producer_subtask: str
    output_artifact_key: str


class DagArtifact(Spec):
    """Where an artifact of a DAG comes from; several selectors mean one of them."""

    artifact_selectors: list[ArtifactSelector] = []

    @property
    def selectors(self) -> list[tuple[str, str]]:
        """Candidates as (task, output)."""
        return [(entry.producer_subtask, entry.output_artifact_key) for entry in self.artifact_selectors]


class DagOutputs(Spec):
    """The outputs of a DAG."""

    parameters: dict[str, DagParameter] = {}
    artifacts: dict[str, DagArtifact] = {}


class Dag(Spec):
    """Tasks, and which of their outputs leave the DAG."""

    tasks: dict[str, Task] = {}
    outputs: DagOutputs = DagOutputs()


class Component(Spec):
    """What a task runs: a DAG or an executor."""

    input_definitions: Definitions = Definitions()
    output_definitions: Definitions = Definitions()
    dag: Dag | None = None
    executor_label: str = ""
    task_config_passthroughs: list[dict[str, Any]] = []
    single_platform_specs: list[dict[str, Any]] = []

    @model_validator(mode="after")
    def _one_implementation(self) -> Self:
        if (self.dag is None) != bool(self.executor_label):
            raise ValueError("wanted either dag or executorLabel")
        return self


class EnvironmentVariable(Spec):
    """A variable of a container."""

    name: str
    value: str = ""


class Accelerator(Spec):
    """What a task asks of GPUs (`type` and `count` are the names of older compilers)."""

    type: str = ""
    count: str = ""
    resource_type: str = ""
    resource_count: str = ""


class Resources(Spec):
    """What a task asks of the machine; the `resource…` names are Kubernetes quantities."""

    cpu_request: float = 0
    cpu_limit: float = 0
    memory_request: float = 0
    memory_limit: float = 0
    resource_cpu_request: str = ""
    resource_cpu_limit: str = ""
    resource_memory_request: str = ""
    resource_memory_limit: str = ""
    accelerator: Accelerator | None = None

    @cached_property
    def cores(self) -> float:
        """Cores asked for; 1 when nothing is said (or only a placeholder)."""
        for text in (self.resource_cpu_request, self.resource_cpu_limit):
            if match := re.fullmatch(r"([\d.]+)(m?)", text):
                return float(match[1]) * _UNITS[match[2]]
        return self.cpu_request or self.cpu_limit or 1.0


class Container(Spec):
    """A command in an image."""

    image: str
    command: list[str] = []
    args: list[str] = []
    env: list[EnvironmentVariable] = []
    resources: Resources = Resources()
    lifecycle: dict[str, Any] = {}


class Importer(Spec):
    """An artifact that exists already."""

    artifact_uri: RuntimeValue
    type_schema: ArtifactType
    metadata: dict[str, Any] = {}
    reimport: bool = False
    download_to_workspace: bool = False


class Executor(Spec):
    """What a leaf component runs."""

    container: Container | None = None
    importer: Importer | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.container is None) == (self.importer is None):
            raise ValueError("wanted either container or importer")
        return self


class Deployment(Spec):
    """The executors by label."""

    executors: dict[str, Executor] = {}


class PipelineInfo(Spec):
    """The pipeline's names."""

    name: str
    display_name: str = ""
    description: str = ""


class PlatformDeployment(Spec):
    """A platform's settings by executor label."""

    executors: dict[str, dict[str, Any]] = {}


class Platform(Spec):
    """What one platform (`kubernetes`, `sagemaker`, `local`) is told beyond the pipeline."""

    deployment_spec: PlatformDeployment = PlatformDeployment()
    pipeline_config: dict[str, Any] = {}


class Pipeline(Spec):
    """A compiled pipeline: the first YAML document, and the platforms of the second."""

    pipeline_info: PipelineInfo
    root: Component
    components: dict[str, Component] = {}
    deployment_spec: Deployment = Deployment()
    default_pipeline_root: str = ""
    sdk_version: str = ""
    schema_version: str = ""
    platforms: dict[str, Platform] = {}

    @cached_property
    def digest(self) -> str:
        """Digest of the whole definition."""
        return digest_of(self.model_dump(mode="json", by_alias=True, exclude_unset=True))

    def component(self, task: Task) -> Component:
        """Return the component a task runs."""
        return self.components[task.component_ref.name]

    def executor(self, component: Component) -> Executor:
        """Return the executor of a leaf component."""
        return self.deployment_spec.executors[component.executor_label]

    def platform(self, name: str, label: str) -> dict[str, Any]:
        """Return what a platform is told about an executor."""
        platform = self.platforms.get(name)
        return platform.deployment_spec.executors.get(label, {}) if platform else {}

    def walk(self) -> Iterator[tuple[str, Task, Component]]:
        """Yield every task with its path (`exit-handler-1/train`), depth first, in an order in which it can run."""
        yield from self._walk(self.root, "")

    def _walk(self, component: Component, prefix: str) -> Iterator[tuple[str, Task, Component]]:
        assert component.dag is not None
        for name in in_order(component.dag, prefix):
            task = component.dag.tasks[name]
            inner = self.component(task)
            yield prefix + name, task, inner
            if inner.dag:
                yield from self._walk(inner, f"{prefix}{name}/")


def in_order(dag: Dag, where: str) -> list[str]:
    """Return the task names of a DAG so that each stands after what it waits for.

    Raises:
        RecipeError: Tasks wait for each other, or for one that does not exist.
    """
    for name, task in dag.tasks.items():
        for upstream in sorted(task.upstream):
            _require(upstream, dag.tasks, "task", f"{where}{name}: dependentTasks")
    ordered: list[str] = []
    done: set[str] = set()
    waiting = list(dag.tasks)
    while waiting:
        ready = next((name for name in waiting if dag.tasks[name].upstream <= done), None)
        if ready is None:
            raise RecipeError(
                "tasks wait for each other", where=f"{where}{waiting[0]}", fix="compile the pipeline again"
            )
        ordered.append(ready)
        done.add(ready)
        waiting.remove(ready)
    return ordered


def load(source: dict[str, Any] | str | Path) -> Pipeline:
    """Read a compiled pipeline and check that it holds together.

    Args:
        source: The YAML file, or its first document as a dict (`platforms`, from the second, may stand in it).

    Raises:
        RecipeError: It is not a pipeline, or it holds something unknown; the message names the place.
    """
    where, raw = ("pipeline", source) if isinstance(source, dict) else (str(source), _read(Path(source)))
    try:
        pipeline = Pipeline.model_validate(raw)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, entry['loc']))}: {_words(entry)}" for entry in error.errors()]
        raise RecipeError(
            "this pipeline holds what is not known:\n    " + "\n    ".join(problems),
            where=where,
            fix="compile it with kfp 2.17, or leave the construct out",
        ) from error
    _check(pipeline)
    return pipeline


def _words(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return "unknown key"
    return str(problem["msg"]).removeprefix("Value error, ")


def _read(path: Path) -> dict[str, Any]:
    try:
        documents = list(yaml.load_all(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot be read: {error}", where=str(path), fix="compile the pipeline again") from error
    if not 1 <= len(documents) <= 2 or not all(isinstance(document, dict) for document in documents):
        raise RecipeError("wanted one or two YAML mappings: a pipeline, and its platforms", where=str(path))
    return {**documents[0], **(documents[1] if len(documents) == 2 else {})}


def _check(pipeline: Pipeline) -> None:
    """Follow every reference once, parse every condition and every template."""
    if pipeline.root.dag is None:
        raise RecipeError("the root is not a DAG", where="root")
    dags = {"root": pipeline.root, **pipeline.components}
    for place, component in dags.items():
        if component.dag is None:
            _require(component.executor_label, pipeline.deployment_spec.executors, "executor", place)
            continue
        in_order(component.dag, f"{place}: ")
        for name, task in component.dag.tasks.items():
            _require(task.component_ref.name, pipeline.components, "component", f"{place}: task {name}")
            _check_condition(task, f"{place}: task {name}")
        selectors = [output.selectors for output in component.dag.outputs.parameters.values()]
        selectors += [output.selectors for output in component.dag.outputs.artifacts.values()]
        for producer, _ in (selector for several in selectors for selector in several):
            _require(producer, component.dag.tasks, "task", f"{place}: outputs")
    for label, executor in pipeline.deployment_spec.executors.items():
        if executor.container:
            placeholders.check([*executor.container.command, *executor.container.args], where=label)
            placeholders.check([entry.value for entry in executor.container.env], where=f"{label}: env")


def _check_condition(task: Task, where: str) -> None:
    try:
        expression = task.trigger_policy.expression
    except ValueError as error:
        raise RecipeError(
            str(error), where=f"{where}: triggerPolicy.condition", fix="write a simpler dsl.If"
        ) from error
    for name in expression.names if expression else ():
        _require(name, task.inputs.parameters, "input", where)


def _require(name: str, known: Any, kind: str, where: str) -> None:
    if name not in known:
        raise RecipeError(f"there is no {kind} {name!r}", where=where, fix="compile the pipeline again")
