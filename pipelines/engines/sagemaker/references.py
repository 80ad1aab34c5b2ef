"""The expressions of a definition (`Get`, `Std:Join`, `Std:JsonGet`): what they refer to, and of which type it is."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import shapes

VARIABLES = {
    "PipelineExecutionId": "string",
    "PipelineExecutionArn": "string",
    "PipelineName": "string",
    "PipelineArn": "string",
    "StartDateTime": "",
    "CurrentDateTime": "",
}
"""Execution variables, and their types."""
_DESCRIBED = {"Processing": "DescribeProcessingJobResponse", "Training": "DescribeTrainingJobResponse"}
_LOOP = {"Status", "InputItemCount", "SucceededStepCount", "FailedStepCount"}
_TYPES = {"String": "string", "Integer": "integer", "Float": "float", "Boolean": "boolean"}
_REFERENCE = re.compile(r"Steps\.([A-Za-z0-9\-_]+)\.(.+)")
_PART = re.compile(r"\.?([A-Za-z0-9]+)|\['([^']+)'\]|\[(\d+)\]")
_OPERATORS = ("Get", "Std:Join", "Std:JsonGet")


@dataclass(frozen=True)
class Scope:
    """What a step may refer to."""

    steps: Mapping[str, dict[str, Any]]
    """Every step of the definition."""
    visible: frozenset[str]
    """Names of those in its own list and in the lists around it."""
    parameters: Mapping[str, str]
    """Types by name."""
    in_loop: bool = False

    def worth(self, value: Any, wanted: str) -> tuple[str, int] | None:
        """Return type (empty: only the run knows) and least length of an expression; None if it is none."""
        if not is_expression(value):
            return None
        operator, operand = next(iter(value.items()))
        if operator == "Std:Join":
            texts = [entry for entry in operand.get("Values", []) if isinstance(entry, str)]
            return "string", sum(map(len, texts)) + len(operand.get("On", "")) * (len(operand.get("Values", [])) - 1)
        return ("" if operator == "Std:JsonGet" else self.type_of(operand)), 0

    def type_of(self, reference: str) -> str:
        """Return the type of what a `Get` refers to; empty when it is wrong or only the run knows."""
        space, _, rest = reference.partition(".")
        if space == "Parameters":
            return _TYPES.get(self.parameters.get(rest, ""), "")
        if space == "Execution":
            return VARIABLES.get(rest, "")
        found = _resolve(reference, self)
        return "" if isinstance(found, str) else found.type_name


def is_expression(value: Any) -> bool:
    """Return whether a value is filled in by the service."""
    return isinstance(value, dict) and len(value) == 1 and next(iter(value)) in _OPERATORS


def references_of(value: Any) -> Iterator[str]:
    """Yield what every `Get` inside a value refers to."""
    if isinstance(value, dict):
        if set(value) == {"Get"}:
            yield str(value["Get"])
        else:
            for entry in value.values():
                yield from references_of(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from references_of(entry)


def steps_of(value: Any) -> Iterator[str]:
    """Yield the names of the steps that a value refers to."""
    return (found[1] for found in map(_REFERENCE.fullmatch, references_of(value)) if found)


def problems(step: Any, scope: Scope) -> Iterator[str]:
    """Yield every reference of a step that leads nowhere, and every expression that is not one."""
    for reference in references_of(step):
        if problem := _problem(reference, scope):
            yield f"{reference}: {problem}"
    yield from _malformed(step)


def _problem(reference: str, scope: Scope) -> str:
    space, _, rest = reference.partition(".")
    if space == "Parameters":
        return "" if rest in scope.parameters else "there is no such parameter"
    if space == "Execution":
        return "" if rest in VARIABLES else "there is no such execution variable"
    if space == "ForEach":
        return "" if scope.in_loop and rest.split(".")[0] == "CurrentItem" else "only inside of a ForEach"
    found = _resolve(reference, scope) if space == "Steps" else "this leads nowhere"
    return found if isinstance(found, str) else ""


def _resolve(reference: str, scope: Scope) -> Any:
    """Return the shape of what a reference to a step leads to, or what is wrong with it."""
    match = _REFERENCE.fullmatch(reference)
    if not match:
        return "not a reference to a step's property"
    name, path = match[1], match[2]
    if name not in scope.steps:
        return f"there is no step {name!r}"
    if name not in scope.visible:
        return f"the step {name!r} is in another branch, or is the step itself: it is not upstream"
    step = scope.steps[name]
    if path.startswith("PropertyFiles."):
        return _property_file(step, path.removeprefix("PropertyFiles."))
    if step.get("Type") == "ForEach" and path.split(".")[0] in _LOOP:
        return shapes.shape("sagemaker", "String")
    if step.get("Type") not in _DESCRIBED:
        return f"a {step.get('Type')} step has no properties"
    return _member(step, path)


def _property_file(step: Mapping[str, Any], name: str) -> Any:
    if name not in [entry.get("PropertyFileName") for entry in step.get("PropertyFiles", [])]:
        return f"{step['Name']} has no property file {name!r}"
    return shapes.shape("sagemaker", "String")


def _member(step: Mapping[str, Any], path: str) -> Any:
    """Follow a path through the shape that describes the job."""
    shape, position = shapes.shape("sagemaker", _DESCRIBED[step["Type"]]), 0
    while position < len(path):
        match = _PART.match(path, position)
        if not match:
            return f"cannot be read from {path[position:]!r} on"
        member, key, _ = match.groups()
        if member is not None:
            if shape.type_name != "structure" or member not in shape.members:
                return f"there is no {member!r} in what describes a {step['Type']} job"
            shape = shape.members[member]
        elif shape.type_name == "list":
            if key is not None and key not in _names(step):
                return f"{step['Name']} has no {key!r} there"
            shape = shape.member
        elif shape.type_name == "map":
            shape = shape.value
        else:
            return f"{match[0]} on what is no list"
        position = match.end()
    return shape


def _names(step: Mapping[str, Any]) -> set[str]:
    """Return the names of a job's inputs and outputs: the service keys its lists by them."""
    arguments = step.get("Arguments", {})
    outputs = arguments.get("ProcessingOutputConfig", {}).get("Outputs", [])
    entries = [*arguments.get("ProcessingInputs", []), *outputs, *arguments.get("InputDataConfig", [])]
    return {entry[key] for entry in entries for key in ("InputName", "OutputName", "ChannelName") if key in entry}


def _malformed(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for entry in value:
            yield from _malformed(entry)
    elif isinstance(value, dict):
        join, extract = value.get("Std:Join"), value.get("Std:JsonGet")
        if join is not None and set(join) != {"On", "Values"}:
            yield "Std:Join has On and Values"
        if extract is not None and set(extract) not in ({"PropertyFile", "Path"}, {"S3Uri", "Path"}):
            yield "Std:JsonGet has PropertyFile (or S3Uri) and Path"
        for entry in value.values():
            yield from _malformed(entry)
