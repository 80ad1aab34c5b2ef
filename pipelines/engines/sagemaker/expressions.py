"""Values and conditions as SageMaker Pipelines writes them: `Get`, `Std:Join`, `Std:JsonGet`, and its conditions."""

import json
from collections.abc import Mapping
from typing import Any

from assay.components.contracts.errors import RecipeError
from assay.pipelines.ir import cel, placeholders

from .bindings import STATUS
from .values import Constant, Imported, Item, Parameter, RunFact, Several, Text, Value, Written

Json = Any
Names = Mapping[str, str]
"""Step name by path of the task."""

_FACTS = {
    "pipeline_job_name": "Execution.PipelineExecutionId",
    "pipeline_job_uuid": "Execution.PipelineExecutionId",
    "pipeline_job_resource_name": "Execution.PipelineExecutionArn",
    "pipeline_job_create_time_utc": "Execution.StartDateTime",
}
"""What SageMaker knows of KFP's run placeholders."""
_SIGNS = {
    "==": "Equals",
    "<": "LessThan",
    "<=": "LessThanOrEqualTo",
    ">": "GreaterThan",
    ">=": "GreaterThanOrEqualTo",
}
_MIRROR = {"==": "==", "<": ">", "<=": ">=", ">": "<", ">=": "<=", "!=": "!="}
_NUMBERS = ("NUMBER_INTEGER", "NUMBER_DOUBLE")


def get(path: str) -> Json:
    """Return a reference."""
    return {"Get": path}


def join(*values: Json, on: str = "") -> Json:
    """Return a text of several values: plain when all of them are, and a lone value as it is."""
    merged: list[Json] = []
    for value in values:
        if on == "" and merged and isinstance(value, str) and isinstance(merged[-1], str):
            merged[-1] += value
        else:
            merged.append(value)
    if all(isinstance(value, str) for value in merged):
        return on.join(merged)
    if len(merged) == 1:
        return merged[0]
    return {"Std:Join": {"On": on, "Values": merged}}


def parameter(value: Value, names: Names, step: str, where: str) -> list[Json]:
    """Return the parts of a settled value, to be joined to a text.

    Args:
        value: Without a `OneOf`.
        names: Of the steps that are visible here.
        step: Name of the step that reads it.
        where: Names the input in an error.

    Raises:
        RecipeError: SageMaker has no way to hand it on.
    """
    match value:
        case Constant(constant):
            return [placeholders.text_of(constant)]
        case Text(parts):
            return [text for part in parts for text in parameter(part, names, step, where)]
        case RunFact(name):
            return _fact(name, step, where)
        case Several(parts):
            return _listing(parts, names, step, where)
        case _:
            return [operand(value, names, where)]


def operand(value: Value, names: Names, where: str) -> Json:
    """Return one value as an expression that keeps its type."""
    match value:
        case Constant(constant):
            return constant
        case Parameter(name, _):
            return get(f"Parameters.{name}")
        case Written(task, output, _):
            return {"Std:JsonGet": {"PropertyFile": get(f"Steps.{names[task]}.PropertyFiles.params"), "Path": output}}
        case Item(key):
            return get(f"ForEach.CurrentItem.{key}" if key else "ForEach.CurrentItem")
    raise RecipeError(f"{type(value).__name__.lower()} cannot stand alone", where=where, fix="pass a single value")


def imported(value: Imported, names: Names, where: str) -> Json:
    """Return the URI of an imported artifact.

    Raises:
        RecipeError: It is a path of this machine.
    """
    uri = join(*parameter(value.uri, names, "", where))
    if isinstance(uri, str) and not uri.startswith("s3://"):
        raise RecipeError(f"{uri!r} is not in S3", where=where, fix="upload it, and name its s3:// URI with --data")
    return uri


def conditions(tree: cel.Node, given: Mapping[str, Value], names: Names, where: str) -> list[Json]:
    """Return a condition as SageMaker's list, all of which must hold.

    Raises:
        RecipeError: SageMaker cannot express it.
    """
    writer = _Conditions(given, names, where)
    terms = tree.terms if isinstance(tree, cel.Every) else (tree,)
    return [writer.of(term) for term in terms]


class _Conditions:
    def __init__(self, given: Mapping[str, Value], names: Names, where: str) -> None:
        self.given, self.names, self.where = given, names, where

    def of(self, node: cel.Node) -> Json:
        match node:
            case cel.Not(term):
                return {"Type": "Not", "Expression": self.of(term)}
            case cel.Some(terms):
                return {"Type": "Or", "Conditions": [self.of(term) for term in terms]}
            case cel.Every(terms):  # inside of || or !, where there is no list: De Morgan
                return _not({"Type": "Or", "Conditions": [_not(self.of(term)) for term in terms]})
            case cel.Compare(sign, left, right):
                return self.compare(sign, left, right)
            case cel.Input():
                return {"Type": "Equals", "LeftValue": self.side(node), "RightValue": True}
        raise self.cannot("a constant as a condition")

    def compare(self, sign: str, left: cel.Node, right: cel.Node) -> Json:
        one, other = self.side(left), self.side(right)
        if not isinstance(one, dict):  # the service wants the variable on the left
            sign, one, other = _MIRROR[sign], other, one
        if sign == "!=":
            return _not({"Type": "Equals", "LeftValue": one, "RightValue": other})
        return {"Type": _SIGNS[sign], "LeftValue": one, "RightValue": other}

    def side(self, node: cel.Node) -> Json:
        match node:
            case cel.Literal(value):
                return value
            case cel.Minus(cel.Literal(value)):
                return -value
            case cel.Input(name):
                return operand(self.given[name], self.names, self.where)
            case cel.Convert(function, cel.Literal(value)):
                return int(value) if function == "int" else float(value) if function == "double" else value
            case cel.Convert("int" | "double", cel.Input(name)) if self.kind(name) in _NUMBERS:
                return self.side(cel.Input(name))  # numbers compare as numbers; kfp writes int() to undo its doubles
        raise self.cannot("this side of a comparison")

    def kind(self, name: str) -> str:
        value = self.given[name]
        return value.kind if isinstance(value, Parameter | Written) else ""

    def cannot(self, what: str) -> RecipeError:
        return RecipeError(f"SageMaker cannot express {what}", where=self.where, fix="compute a bool in a step")


def _not(condition: Json) -> Json:
    if condition["Type"] == "Not":
        return condition["Expression"]
    return {"Type": "Not", "Expression": condition}


def _fact(name: str, step: str, where: str) -> list[Json]:
    if name == "pipeline_task_name":
        return [step]
    if name == STATUS:  # SageMaker tells a step nothing of the ones before it; the execution can be asked
        status = {"state": "UNKNOWN", "pipelineTaskName": "", "error": {}, "pipelineJobResourceName": ""}
        text = json.dumps(status)[:-2]
        return [text, get("Execution.PipelineExecutionArn"), '"}']
    if name not in _FACTS:
        raise RecipeError(
            f"SageMaker has nothing for the placeholder {name}", where=where, fix="pass the value as a parameter"
        )
    return [get(_FACTS[name])]


def _listing(parts: tuple[Value, ...], names: Names, step: str, where: str) -> list[Json]:
    """Return a list of numbers as JSON text: only numbers need no quoting that the service could not do."""
    for part in parts:
        if not (isinstance(part, Written) and part.kind in _NUMBERS):
            raise RecipeError(
                "only numbers can be collected over the rounds of a loop", where=where, fix="write an artifact instead"
            )
    texts: list[Json] = ["["]
    for number, part in enumerate(parts):
        texts += [", "] * (number > 0) + parameter(part, names, step, where)
    return [*texts, "]"]
