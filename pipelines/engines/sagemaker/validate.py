"""Our check of a pipeline definition, before anything is sent.

The service stores a definition that breaks at run time, and the emulators of AWS store any text at all, so their
acceptance proves nothing. Here every request is held against botocore's service model (`shapes`), every reference
against what it refers to, and the graph against what the service can order.
"""

import graphlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from assay.pipelines.ir.portability import Finding

from . import references, rules, shapes
from .references import Scope

MEBIBYTE = 1 << 20
_JOBS = {
    "Processing": ("CreateProcessingJobRequest", frozenset({"ProcessingJobName"})),
    "Training": ("CreateTrainingJobRequest", frozenset({"TrainingJobName"})),
}
_KEYS = {"Name", "Type", "Arguments", "DependsOn", "DisplayName", "Description"}
_JOB_KEYS = _KEYS | {"CacheConfig", "RetryPolicies", "PropertyFiles"}
_LISTS = ("IfSteps", "ElseSteps", "ForEachBody")
_STEP = re.compile(r"[A-Za-z0-9\-_]{1,64}")
_COMPARISONS = {"Equals", "GreaterThan", "GreaterThanOrEqualTo", "LessThan", "LessThanOrEqualTo"}
_PARAMETER_TYPES: dict[str, tuple[type, ...]] = {
    "String": (str,),
    "Integer": (int,),
    "Float": (int, float),
    "Boolean": (bool,),
}


@dataclass
class _Check:
    """One pass over one definition."""

    definition: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    edges: dict[str, set[str]] = field(default_factory=dict)
    """What each step waits for."""

    def tell(self, where: str, what: str) -> None:
        self.findings.append(Finding("error", where, what, "correct the recipe or the deploy profile"))

    def run(self) -> list[Finding]:
        if set(self.definition) - {
            "Version",
            "Metadata",
            "Parameters",
            "PipelineExperimentConfig",
            "MlflowConfig",
            "Steps",
        }:
            self.tell("definition", "it holds a key that is not known")
        if len(json.dumps(self.definition, separators=(",", ":")).encode()) > MEBIBYTE:
            self.tell("definition", "it is larger than 1 MiB")
        if not self.definition.get("Steps"):
            self.tell("definition", "it has no steps")
        self._parameters()
        for step in walk(self.definition.get("Steps", [])):
            self._name(step)
        self._list(self.definition.get("Steps", []), frozenset(), None)
        self._cycles()
        return self.findings

    # ---- the whole

    def _parameters(self) -> None:
        entries = self.definition.get("Parameters", [])
        if len(entries) > 200:
            self.tell("Parameters", f"{len(entries)} parameters, at most 200 are allowed")
        names = [entry.get("Name", "") for entry in entries]
        for name in sorted({name for name in names if names.count(name) > 1}):
            self.tell(f"Parameters.{name}", "two parameters have this name")
        for entry in entries:
            where, kind = f"Parameters.{entry.get('Name', '')}", entry.get("Type")
            if not _STEP.fullmatch(entry.get("Name", "")):
                self.tell(where, "not a name")
            if kind not in _PARAMETER_TYPES:
                self.tell(where, f"there is no type {kind!r}")
            elif "DefaultValue" in entry:
                self._default(entry["DefaultValue"], kind, where)

    def _default(self, value: Any, kind: str, where: str) -> None:
        if not isinstance(value, _PARAMETER_TYPES[kind]) or (kind != "Boolean" and isinstance(value, bool)):
            self.tell(where, f"the default {str(value)[:40]!r} is not of type {kind}")
        if len(str(value)) > 1024:
            self.tell(where, f"the default has {len(str(value))} characters, at most 1024 are allowed")

    def _name(self, step: dict[str, Any]) -> None:
        name = step.get("Name", "")
        if not isinstance(name, str) or not _STEP.fullmatch(name):
            self.tell(str(name), "not a step's name: 1 to 64 letters, digits, - and _")
        if name in self.steps:
            self.tell(name, "two steps have this name")
        self.steps[name] = step

    def _cycles(self) -> None:
        try:
            graphlib.TopologicalSorter(self.edges).prepare()
        except graphlib.CycleError as error:
            self.tell(error.args[1][0], f"steps wait for each other: {' → '.join(error.args[1])}")

    # ---- steps

    def _list(self, steps: list[dict[str, Any]], outer: frozenset[str], parent: dict[str, Any] | None) -> None:
        """Check a list of steps; `outer` are the steps visible from outside of it."""
        visible = outer | {step.get("Name", "") for step in steps}
        for step in steps:
            name = step.get("Name", "")
            self.edges[name] = {parent["Name"]} if parent else set()
            scope = Scope(
                self.steps,
                visible - {name},
                {entry.get("Name", ""): entry.get("Type", "") for entry in self.definition.get("Parameters", [])},
                in_loop=parent is not None and parent.get("Type") == "ForEach",
            )
            self._step(step, scope)
            for key in _LISTS:
                inner = step.get("Arguments", {}).get(key)
                if inner:
                    self._list(inner, visible - {name}, step)

    def _step(self, step: dict[str, Any], scope: Scope) -> None:
        name, kind, arguments = step.get("Name", ""), step.get("Type"), step.get("Arguments", {})
        own = {**step, "Arguments": {key: value for key, value in arguments.items() if key not in _LISTS}}
        for problem in references.problems(own, scope):
            self.tell(name, problem)
        self.edges[name] |= {other for other in references.steps_of(own) if other in scope.visible}
        self._order(step, scope)
        if unknown := set(step) - (_JOB_KEYS if kind in _JOBS else _KEYS):
            self.tell(name, f"a {kind} step has no {', '.join(sorted(unknown))}")
        if kind in _JOBS:
            self._job(step, scope)
        elif kind == "Condition":
            for condition in arguments.get("Conditions") or [{}]:
                self._condition(condition, name)
        elif kind == "ForEach":
            self._for_each(arguments, name)
        elif kind != "Fail":
            self.tell(name, f"there is no step type {kind!r} here")

    def _order(self, step: dict[str, Any], scope: Scope) -> None:
        for entry in step.get("DependsOn", []):
            other = entry.get("Step", "") if isinstance(entry, dict) else entry
            if other not in scope.visible:
                self.tell(step["Name"], f"DependsOn names {other!r}, which is no step that it can see")
            elif self.steps[other].get("Type") == "Condition":
                self.tell(step["Name"], f"DependsOn names {other!r}: nothing can wait for a Condition")
            else:
                self.edges[step["Name"]].add(other)

    def _job(self, step: dict[str, Any], scope: Scope) -> None:
        name, arguments = step["Name"], step.get("Arguments", {})
        request, left_out = _JOBS[step["Type"]]
        shape = shapes.shape("sagemaker", request)
        for where, what in shapes.problems(shape, arguments, scope.worth, left_out):
            self.tell(f"{name}: {where}" if where else name, what)
        for what in rules.problems(step):
            self.tell(name, what)

    def _condition(self, condition: Any, name: str) -> None:
        kind = condition.get("Type") if isinstance(condition, dict) else None
        if kind == "Not":
            self._condition(condition.get("Expression"), name)
        elif kind == "Or":
            for inner in condition.get("Conditions") or [{}]:
                self._condition(inner, name)
        elif kind in _COMPARISONS:
            if set(condition) != {"Type", "LeftValue", "RightValue"}:
                self.tell(name, f"{kind} compares LeftValue with RightValue")
            elif not isinstance(condition["LeftValue"], dict):
                self.tell(name, f"{kind} has a constant on its left: it decides nothing")
        else:
            self.tell(name, f"there is no condition of type {kind!r}")

    def _for_each(self, arguments: Mapping[str, Any], name: str) -> None:
        items = arguments.get("IterableItems")
        if isinstance(items, list) and len(items) > 100:
            self.tell(name, f"{len(items)} items, at most 100 are allowed")
        if not 1 <= arguments.get("MaxConcurrency", 1) <= 50:
            self.tell(name, "MaxConcurrency lies between 1 and 50")
        for inner in arguments.get("ForEachBody", []):
            if inner.get("Type") not in _JOBS:
                self.tell(name, f"a ForEach cannot hold the {inner.get('Type')} step {inner.get('Name')}")


def check(definition: dict[str, Any]) -> list[Finding]:
    """Return everything that is wrong with a pipeline definition; each finding names the step and the place in it."""
    return _Check(definition).run()


def check_request(service: str, shape: str, request: dict[str, Any], where: str) -> list[Finding]:
    """Return everything that is wrong with a request to a service, for example Bedrock's."""
    found = shapes.problems(shapes.shape(service, shape), request, lambda value, kind: None)
    return [
        Finding("error", f"{where}: {place}" if place else where, what, "correct the settings") for place, what in found
    ]


def walk(steps: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield every step, those inside of conditions and loops too."""
    for step in steps:
        yield step
        for key in _LISTS:
            yield from walk(step.get("Arguments", {}).get(key) or ())
