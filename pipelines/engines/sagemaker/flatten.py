"""The compiled graph made flat: sub-pipelines opened, loops unrolled, every input traced to who makes it.

Conditions over constants are decided here, so a loop's `dsl.If` on its item costs nothing at run time.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from assay.components.contracts.errors import RecipeError
from assay.pipelines.ir.model import ArtifactInput, Component, Importer, ParameterInput, Pipeline, Task, in_order

from .bindings import STATUS, filled, keyed, listed, typed
from .branches import is_choice, names, number_of, undecided
from .graph import Case, Choice, Leaf, Loop, Node
from .values import Constant, Guard, Imported, Item, OneOf, Parameter, RunFact, Several, Stored, Value, Written


@dataclass(frozen=True)
class _Scope:
    """What the tasks of a DAG see, and where they are."""

    parameters: Mapping[str, Value] = field(default_factory=dict)
    artifacts: Mapping[str, Value] = field(default_factory=dict)
    prefix: str = ""
    guard: Guard = ()
    after: tuple[str, ...] = ()


@dataclass
class _Made:
    """What a task left: its outputs, and the leaves in it."""

    parameters: dict[str, Value] = field(default_factory=dict)
    artifacts: dict[str, Value] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()


def flatten(pipeline: Pipeline, *, for_each: bool = False) -> list[Node]:
    """Return the nodes of a pipeline so that each stands after what it waits for.

    Args:
        pipeline: The compiled pipeline.
        for_each: Keep a loop whose list only the run knows; otherwise it is an error.

    Raises:
        RecipeError: The graph holds what SageMaker cannot do; the message names the place.
    """
    flat = _Flat(pipeline, for_each)
    root = pipeline.root.input_definitions.parameters
    given: dict[str, Value] = {
        name: Parameter(name, spec.parameter_type)
        for name, spec in root.items()
        if not spec.is_optional or spec.default_value is not None
    }
    flat.dag(pipeline.root, _Scope(given))
    return flat.nodes


class _Flat:
    def __init__(self, pipeline: Pipeline, for_each: bool) -> None:
        self.pipeline, self.for_each = pipeline, for_each
        self.nodes: list[Node] = []

    def dag(self, component: Component, scope: _Scope) -> _Made:
        """Add the tasks of a DAG, and return its outputs."""
        assert component.dag is not None
        made: dict[str, _Made] = {}
        for name in in_order(component.dag, scope.prefix):
            made[name] = self._task(name, component.dag.tasks[name], scope, made)
        return _leaving(component, made)

    def _task(self, name: str, task: Task, scope: _Scope, made: dict[str, _Made]) -> _Made:
        path = f"{scope.prefix}{name}"
        component = self.pipeline.component(task)
        waits = tuple(dict.fromkeys(node for other in sorted(task.upstream) for node in made[other].nodes))
        inner = replace(scope, prefix=f"{path}/", after=waits or scope.after)
        given, artifacts = self._inputs(path, task, scope, made)
        if task.artifact_iterator:
            raise RecipeError(
                "SageMaker cannot loop over artifacts", where=f"root/{path}", fix="loop over a list of constants"
            )
        if task.parameter_iterator:
            return self._loop(path, task, component, replace(inner, parameters=given, artifacts=artifacts))
        if task.trigger_policy.expression:
            return self._choice(path, [(name, task, component, given, artifacts)], inner)
        if component.dag and is_choice(component):
            cases = self._cases(component, replace(inner, parameters=given, artifacts=artifacts))
            return _leaving(component, self._choices(path, cases, inner))
        if component.dag:
            return self.dag(component, replace(inner, parameters=self._bound(component, given), artifacts=artifacts))
        executor = self.pipeline.executor(component)
        if executor.importer:
            return self._import(path, component, executor.importer, given)
        assert executor.container is not None
        bound = self._bound(component, given)
        leaf = Leaf(path, task, component, executor.container, bound, artifacts, inner.after, scope.guard)
        self.nodes.append(leaf)
        return _outputs(leaf)

    # ---- inputs

    def _inputs(
        self, path: str, task: Task, scope: _Scope, made: dict[str, _Made]
    ) -> tuple[dict[str, Value], dict[str, Value]]:
        found: dict[str, Value] = {}
        for name, source in task.inputs.parameters.items():
            if source.runtime_value is None and (value := self._parameter(path, source, scope, made)) is not None:
                found[name] = value
        for name, source in task.inputs.parameters.items():
            if source.runtime_value is not None and source.runtime_value.constant is not None:
                found[name] = filled(source.runtime_value.constant, found, f"root/{path}: {name}")
        artifacts = {
            name: value
            for name, entry in task.inputs.artifacts.items()
            if (value := self._artifact(entry, scope, made)) is not None
        }
        return found, artifacts

    def _parameter(self, path: str, source: ParameterInput, scope: _Scope, made: dict[str, _Made]) -> Value | None:
        value: Value | None
        if source.component_input_parameter is not None:
            value = scope.parameters.get(source.component_input_parameter)
        elif source.task_output_parameter:
            origin = source.task_output_parameter
            value = made[origin.producer_task].parameters.get(origin.output_parameter_key)
        else:
            value = RunFact(STATUS)
        return keyed(value, source.item_key, f"root/{path}")

    def _artifact(self, source: ArtifactInput, scope: _Scope, made: dict[str, _Made]) -> Value | None:
        if source.task_output_artifact:
            origin = source.task_output_artifact
            return made[origin.producer_task].artifacts.get(origin.output_artifact_key)
        return scope.artifacts.get(source.component_input_artifact or "")

    def _bound(self, component: Component, given: Mapping[str, Value]) -> dict[str, Value]:
        """Return the values of a component's parameters: those given, then the defaults, constants by their type."""
        bound: dict[str, Value] = {}
        for name, spec in component.input_definitions.parameters.items():
            default = Constant(spec.default_value) if spec.default_value is not None else None
            value = given.get(name, default)
            if isinstance(value, Constant):
                value = Constant(typed(value.value, spec.parameter_type, name))
            if value is not None:
                bound[name] = value
        return bound

    def _import(self, path: str, component: Component, importer: Importer, given: Mapping[str, Value]) -> _Made:
        uri = importer.artifact_uri
        value = given.get(uri.runtime_parameter) if uri.runtime_parameter else Constant(uri.constant)
        if value is None:
            raise RecipeError("the importer is given no URI", where=f"root/{path}", fix="give it one")
        name = next(iter(component.output_definitions.artifacts), "artifact")
        return _Made(artifacts={name: Imported(value)})

    # ---- loops

    def _loop(self, path: str, task: Task, component: Component, scope: _Scope) -> _Made:
        loop = task.parameter_iterator
        assert loop is not None
        source = loop.items
        items = Constant(json.loads(source.raw)) if source.raw else scope.parameters.get(source.input_parameter)
        limit = task.iterator_policy.parallelism_limit
        if not isinstance(items, Constant):
            return self._for_each(path, component, loop.item_input, items, limit, scope)
        rounds: list[_Made] = []
        for number, item in enumerate(listed(items.value, f"root/{path}")):
            waits = rounds[number - limit].nodes if limit and number >= limit else scope.after
            one = replace(scope, prefix=f"{path}[{number}]/", after=waits)
            given = self._bound(component, {**scope.parameters, loop.item_input: Constant(item)})
            rounds.append(self.dag(component, replace(one, parameters=given)))
        return _gathered(component, rounds)

    def _for_each(
        self, path: str, component: Component, item: str, items: Value | None, limit: int, scope: _Scope
    ) -> _Made:
        if not self.for_each or items is None:
            raise RecipeError(
                "the list of this loop is known at run time only",
                where=f"root/{path}",
                fix="loop over a list of constants, or set features.for_each in the deploy profile",
            )
        before = len(self.nodes)
        inner = replace(scope, parameters={**scope.parameters, item: Item()}, guard=(), after=())
        self.dag(component, inner)
        body = self.nodes[before:]
        del self.nodes[before:]
        plain = tuple(node for node in body if isinstance(node, Leaf))
        if len(plain) < len(body):
            raise RecipeError(
                "a ForEach can hold neither a condition nor another loop",
                where=f"root/{path}",
                fix="take it out of the loop",
            )
        self.nodes.append(Loop(path, items, limit, plain, scope.after, scope.guard))
        return _Made(nodes=(path,))

    # ---- conditions

    def _cases(self, component: Component, scope: _Scope) -> list[tuple[str, Task, Component, Any, Any]]:
        assert component.dag is not None
        cases = []
        for name, task in sorted(component.dag.tasks.items(), key=lambda entry: number_of(entry[0])):
            given, artifacts = self._inputs(f"{scope.prefix}{name}", task, scope, {})
            cases.append((name, task, self.pipeline.component(task), given, artifacts))
        return cases

    def _choice(self, path: str, cases: list[Any], scope: _Scope) -> _Made:
        """Add a lone `dsl.If`."""
        return next(iter(self._choices(path, cases, scope, lone=True).values()), _Made())

    def _choices(self, path: str, cases: list[Any], scope: _Scope, *, lone: bool = False) -> dict[str, _Made]:
        """Add a condition with its branches, and return what each branch leaves, by its task's name."""
        open_: list[Case] = []
        bodies = []
        for name, task, component, given, artifacts in cases:
            assert task.trigger_policy.expression is not None
            before = [case.expression for case in open_]
            expression = undecided(task.trigger_policy.expression, given, f"root/{path}", before)
            if expression is False:
                continue
            condition = None if expression is True else expression
            prefix = f"{path}/" if lone else f"{path}/{name}/"
            bodies.append((name, component, given, artifacts, prefix))
            open_.append(Case(task.task_info.name or name, condition, given if condition else {}))
            if condition is None:
                break
        if not bodies:
            return {}
        if open_[0].expression is not None:
            read = tuple(
                replace(case, given={key: case.given[key] for key in sorted(names(case.expression))}) for case in open_
            )
            self.nodes.append(Choice(path, read, scope.after, scope.guard))
        made = {}
        for number, (name, component, given, artifacts, prefix) in enumerate(bodies):
            guard = scope.guard if open_[0].expression is None else (*scope.guard, (path, number))
            bound = self._bound(component, given)
            after = scope.after if open_[0].expression is None else ()
            inner = _Scope(bound, artifacts, prefix, guard, after)
            made[name] = self.dag(component, inner)
            made[name] = _guarded(made[name], guard[len(scope.guard) :])
        return made


def _guarded(made: _Made, guard: Guard) -> _Made:
    """Mark outputs as those of a branch."""
    if not guard:
        return made
    return _Made(
        {name: OneOf(((guard, value),)) for name, value in made.parameters.items()},
        {name: OneOf(((guard, value),)) for name, value in made.artifacts.items()},
        made.nodes,
    )


def _leaving(component: Component, made: Mapping[str, _Made]) -> _Made:
    """Return what leaves a DAG, given what its tasks left."""
    assert component.dag is not None
    outputs = component.dag.outputs
    parameters = {name: _chosen(made, entry.selectors, "parameters") for name, entry in outputs.parameters.items()}
    artifacts = {name: _chosen(made, entry.selectors, "artifacts") for name, entry in outputs.artifacts.items()}
    return _Made(
        {name: value for name, value in parameters.items() if value},
        {name: value for name, value in artifacts.items() if value},
        tuple(node for entry in made.values() for node in entry.nodes),
    )


def _chosen(made: Mapping[str, _Made], selectors: list[tuple[str, str]], kind: str) -> Value | None:
    found = [getattr(made[task], kind).get(key) for task, key in selectors if task in made]
    options = [value for value in found if value is not None]
    if len(options) <= 1:
        return options[0] if options else None
    return OneOf(
        tuple(entry for value in options for entry in (value.options if isinstance(value, OneOf) else [((), value)]))
    )


def _outputs(leaf: Leaf) -> _Made:
    declared = leaf.component.output_definitions
    return _Made(
        {name: Written(leaf.path, name, spec.parameter_type) for name, spec in declared.parameters.items()},
        {name: Stored(leaf.path, name) for name in declared.artifacts},
        (leaf.path,),
    )


def _gathered(component: Component, rounds: list[_Made]) -> _Made:
    """Return the outputs of a loop: of each the list over its rounds."""
    declared = component.output_definitions
    return _Made(
        {
            name: Several(tuple(made.parameters[name] for made in rounds if name in made.parameters))
            for name in declared.parameters
        },
        {
            name: Several(tuple(made.artifacts[name] for made in rounds if name in made.artifacts))
            for name in declared.artifacts
        },
        tuple(node for made in rounds for node in made.nodes),
    )
