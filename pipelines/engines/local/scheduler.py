"""Runs a DAG: independent tasks at once, conditions, loops, exit handlers, nested pipelines."""

import json
import queue
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from assay.components.contracts.errors import AssayError, RunError
from assay.pipelines.ir import placeholders, values
from assay.pipelines.ir.model import Component, Dag, Importer, ParameterInput, Task, in_order

from .artifacts import Artifact, imported
from .events import DONE
from .step import USERS_FAULT, Outcome, Session, Step

_ITERATIONS_AT_ONCE = 32
"""Of a loop without a limit of its own; the core budget decides what really runs."""


@dataclass(frozen=True)
class Scope:
    """The inputs of a DAG, as its tasks see them."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    artifacts: Mapping[str, list[Artifact]] = field(default_factory=dict)


@dataclass(frozen=True)
class Node:
    """A task on its way: where it is, and what it is given."""

    path: str
    task: Task
    component: Component
    anew: bool

    @property
    def title(self) -> str:
        """The display name."""
        return self.task.task_info.name or self.path


class Scheduler:
    """Runs the tasks of one run."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def run_dag(self, component: Component, scope: Scope, prefix: str, anew: bool) -> Outcome:
        """Run a DAG to its end and return its outcome with its outputs.

        A failed task stops what depends on it and nothing else.
        """
        assert component.dag is not None
        dag = component.dag
        outcomes: dict[str, Outcome] = {}
        ended: queue.SimpleQueue[tuple[str, Outcome | BaseException]] = queue.SimpleQueue()
        waiting = in_order(dag, prefix)
        while len(outcomes) < len(dag.tasks):
            for name in [name for name in waiting if dag.tasks[name].upstream <= outcomes.keys()]:
                waiting.remove(name)
                self._start(dag, name, scope, prefix, anew, dict(outcomes), ended)
            name, outcome = ended.get()
            if isinstance(outcome, BaseException):
                self.session.stop.request(f"the engine failed: {outcome}")
                raise outcome
            outcomes[name] = outcome
        return _summary(dag, outcomes)

    def _start(
        self,
        dag: Dag,
        name: str,
        scope: Scope,
        prefix: str,
        anew: bool,
        upstream: dict[str, Outcome],
        ended: "queue.SimpleQueue[tuple[str, Outcome | BaseException]]",
    ) -> None:
        def work() -> None:
            try:
                ended.put((name, self._run_task(dag.tasks[name], prefix + name, scope, upstream, anew)))
            except BaseException as error:  # a bug of ours: it must reach the caller, not die with the thread
                ended.put((name, error))

        threading.Thread(target=work, name=prefix + name, daemon=True).start()

    def _run_task(self, task: Task, path: str, scope: Scope, siblings: dict[str, Outcome], anew: bool) -> Outcome:
        upstream = {name: siblings[name] for name in sorted(task.upstream)}
        named = re.sub(r"\[\d+\]", "", path) in self.session.from_step
        anew = anew or named or any(outcome.anew for outcome in upstream.values())
        node = Node(path, task, self.session.pipeline.component(task), anew)
        if self.session.stop.wanted:
            return Outcome("CANCELLED", message=self.session.stop.reason)
        if task.needs_success and (bad := [name for name, entry in upstream.items() if entry.state not in DONE]):
            return self._skip(node, f"{bad[0]} {_verb(upstream[bad[0]].state)}")
        try:
            given = self._parameters(node, scope, siblings)
            artifacts = self._artifacts(node, scope, siblings)
            if not _holds(node, given):
                return self._skip(node, f"the condition is false: {task.trigger_policy.condition}")
            return self._dispatch(node, given, artifacts)
        except AssayError as error:
            return self._failed(node, str(error))
        except OSError as error:  # of an importer: a step answers for its own
            return self._failed(node, f"{error.filename or path}: {error.strerror or error}")

    def _failed(self, node: Node, message: str) -> Outcome:
        self.session.recorder.task(node.path, node.title, "FAILED", message=message, exit_code=USERS_FAULT)
        return Outcome("FAILED", message=message, exit_code=USERS_FAULT, anew=node.anew)

    def _dispatch(self, node: Node, given: dict[str, Any], artifacts: dict[str, list[Artifact]]) -> Outcome:
        if node.task.parameter_iterator or node.task.artifact_iterator:
            return self._run_loop(node, given, artifacts)
        return self._run_component(node, given, artifacts)

    def _run_component(self, node: Node, given: dict[str, Any], artifacts: dict[str, list[Artifact]]) -> Outcome:
        inputs = node.component.input_definitions
        parameters = values.bind(given, inputs.parameters, f"task {node.path}")
        for name, spec in inputs.artifacts.items():
            if name not in artifacts and not spec.is_optional:
                raise RunError(f"the artifact {name!r} was not made", where=f"task {node.path}")
        if node.component.dag:
            return self._run_graph(node, Scope(parameters, artifacts))
        executor = self.session.pipeline.executor(node.component)
        if executor.importer:
            return self._import(node, executor.importer, {**given, **parameters})
        assert executor.container is not None
        return Step(
            self.session, node.path, node.task, node.component, executor.container, parameters, artifacts, node.anew
        ).run()

    def _run_graph(self, node: Node, scope: Scope) -> Outcome:
        started = time.time()
        self.session.recorder.task(node.path, node.title, "RUNNING", started=started, message="")
        outcome = self.run_dag(node.component, scope, f"{node.path}/", node.anew)
        seconds = time.time() - started
        self.session.recorder.task(node.path, node.title, outcome.state, seconds=seconds, message=outcome.message)
        return replace(outcome, anew=outcome.anew or node.anew)

    def _import(self, node: Node, importer: Importer, given: dict[str, Any]) -> Outcome:
        uri = importer.artifact_uri
        location = given[uri.runtime_parameter] if uri.runtime_parameter else uri.constant
        executor_input = {"inputs": {"parameterValues": given, "artifacts": {}}}
        metadata = {
            key: placeholders.resolve_text(value, executor_input, self.session.run_values)
            if isinstance(value, str)
            else value
            for key, value in importer.metadata.items()
        }
        type_ = importer.type_schema.model_dump(by_alias=True, exclude_unset=True)
        artifact = imported(str(location), type_, metadata, self.session.home)
        name = next(iter(node.component.output_definitions.artifacts), "artifact")
        self.session.recorder.task(node.path, node.title, "SUCCEEDED", message="")
        return Outcome("SUCCEEDED", artifacts={name: [replace(artifact, name=name)]}, anew=node.anew)

    def _run_loop(self, node: Node, given: dict[str, Any], artifacts: dict[str, list[Artifact]]) -> Outcome:
        """Run every iteration; outputs become lists in the order of the items (artifacts of nested loops flat)."""
        if loop := node.task.parameter_iterator:
            items = _parsed(loop.items.raw or given.get(loop.items.input_parameter), node)
            if not isinstance(items, list):
                raise RunError(f"wanted a list to loop over, got {items!r}", where=f"task {node.path}")
            rounds = [({**given, loop.item_input: item}, artifacts) for item in items]
        else:
            loop = node.task.artifact_iterator
            assert loop is not None
            found = artifacts.get(loop.items.input_artifact, [])
            rounds = [(given, {**artifacts, loop.item_input: [item]}) for item in found]
        self.session.recorder.task(node.path, node.title, "RUNNING")
        limit = node.task.iterator_policy.parallelism_limit or _ITERATIONS_AT_ONCE
        with ThreadPoolExecutor(max(1, min(limit, len(rounds)))) as pool:
            done = list(pool.map(lambda entry: self._round(node, *entry), enumerate(rounds)))
        outcome = _gathered(node, done)
        self.session.recorder.task(node.path, node.title, outcome.state, message=outcome.message)
        return outcome

    def _round(self, node: Node, number: int, inputs: tuple[dict[str, Any], dict[str, list[Artifact]]]) -> Outcome:
        one = replace(node, path=f"{node.path}[{number}]")
        try:
            return self._run_component(one, *inputs)
        except AssayError as error:
            return self._failed(one, str(error))

    def _skip(self, node: Node, why: str) -> Outcome:
        """Record that a task, and all inside it, does not run."""
        self.session.recorder.task(node.path, node.title, "SKIPPED", message=why)
        if node.component.dag:
            for name in in_order(node.component.dag, node.path):
                inner = node.component.dag.tasks[name]
                self._skip(Node(f"{node.path}/{name}", inner, self.session.pipeline.component(inner), False), why)
        return Outcome("SKIPPED", message=why, anew=node.anew)

    def _parameters(self, node: Node, scope: Scope, siblings: dict[str, Outcome]) -> dict[str, Any]:
        """Return the values of a task's inputs by type; those without a value are left out."""
        sources = node.task.inputs.parameters
        found = {
            name: value
            for name, source in sources.items()
            if source.runtime_value is None and (value := self._value(node, source, scope, siblings)) is not None
        }
        constants = {
            name: placeholders.resolve_constant(source.runtime_value.constant, found, self.session.run_values)
            for name, source in sources.items()
            if source.runtime_value is not None and source.runtime_value.constant is not None
        }
        declared = node.component.input_definitions.parameters
        return {
            name: values.cast(value, declared[name].parameter_type, f"task {node.path}: {name}")
            if name in declared
            else value
            for name, value in {**found, **constants}.items()
        }

    def _value(self, node: Node, source: ParameterInput, scope: Scope, siblings: dict[str, Outcome]) -> Any:
        if source.component_input_parameter is not None:
            value = scope.parameters.get(source.component_input_parameter)
        elif source.task_output_parameter:
            value = siblings[source.task_output_parameter.producer_task].parameters.get(
                source.task_output_parameter.output_parameter_key
            )
        else:
            assert source.task_final_status is not None
            value = self._final_status(source.task_final_status.producer_task, siblings)
        key = source.item_key
        if key is None or value is None:
            return value
        item = _parsed(value, node)
        if not isinstance(item, dict) or key not in item:
            raise RunError(f"the loop item {item!r} has no key {key!r}", where=f"task {node.path}")
        return item[key]

    def _final_status(self, name: str, siblings: dict[str, Outcome]) -> dict[str, Any]:
        outcome = siblings[name]
        failed = {"code": outcome.exit_code or 1, "message": outcome.message}
        return {
            "state": "SUCCEEDED" if outcome.state in DONE else outcome.state,
            "pipelineTaskName": name,
            "pipelineJobResourceName": self.session.run_values["pipeline_job_resource_name"],
            "error": failed if outcome.state == "FAILED" else {},
        }

    def _artifacts(self, node: Node, scope: Scope, siblings: dict[str, Outcome]) -> dict[str, list[Artifact]]:
        found = {}
        for name, source in node.task.inputs.artifacts.items():
            if source.task_output_artifact:
                producer = siblings[source.task_output_artifact.producer_task]
                value = producer.artifacts.get(source.task_output_artifact.output_artifact_key)
            else:
                value = scope.artifacts.get(source.component_input_artifact or "")
            if value is not None:
                found[name] = value
        return found


def _holds(node: Node, given: Mapping[str, Any]) -> bool:
    """Return whether a task's condition is true, or there is none.

    Raises:
        RunError: It cannot be decided: a gate is never decided by a guess.
    """
    expression = node.task.trigger_policy.expression
    try:
        return expression is None or expression.evaluate(given)
    except ValueError as error:
        raise RunError(str(error), where=f"task {node.path}", fix="compare values of one type") from error


def _parsed(value: Any, node: Node) -> Any:
    """Return a value that may stand as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RunError(f"{value[:80]!r} is not JSON", where=f"task {node.path}") from error


def _verb(state: str) -> str:
    return {"FAILED": "failed", "SKIPPED": "was skipped", "CANCELLED": "was stopped"}[state]


def _worst(states: list[str]) -> str:
    """Return the state of a whole by those of its parts."""
    return next((state for state in ("CANCELLED", "FAILED") if state in states), "SUCCEEDED")


def _summary(dag: Dag, outcomes: dict[str, Outcome]) -> Outcome:
    """Return the outcome of a DAG: its outputs are there as far as their tasks succeeded."""

    def first(selectors: list[tuple[str, str]], kind: str) -> Any:
        written = (getattr(outcomes[task], kind) for task, _ in selectors)
        return next((found[key] for found, (_, key) in zip(written, selectors, strict=True) if key in found), None)

    parameters = {name: first(output.selectors, "parameters") for name, output in dag.outputs.parameters.items()}
    artifacts = {name: first(output.selectors, "artifacts") for name, output in dag.outputs.artifacts.items()}
    state = _worst([outcome.state for outcome in outcomes.values()])
    bad = [(name, outcome) for name, outcome in outcomes.items() if outcome.state == state and state != "SUCCEEDED"]
    return Outcome(
        state,
        {name: value for name, value in parameters.items() if value is not None},
        {name: value for name, value in artifacts.items() if value is not None},
        "; ".join(f"{name}: {outcome.message}" for name, outcome in bad),
        max((outcome.exit_code for _, outcome in bad), default=0),
        any(outcome.anew for outcome in outcomes.values()),
    )


def _gathered(node: Node, done: list[Outcome]) -> Outcome:
    outputs = node.component.output_definitions
    state = _worst([outcome.state for outcome in done])
    bad = next((outcome for outcome in done if outcome.state == state), None) if state != "SUCCEEDED" else None
    return Outcome(
        state,
        {
            name: [outcome.parameters[name] for outcome in done if name in outcome.parameters]
            for name in outputs.parameters
        },
        {
            name: [artifact for outcome in done for artifact in outcome.artifacts.get(name, [])]
            for name in outputs.artifacts
        },
        bad.message if bad else "",
        bad.exit_code if bad else 0,
        node.anew or any(outcome.anew for outcome in done),
    )
