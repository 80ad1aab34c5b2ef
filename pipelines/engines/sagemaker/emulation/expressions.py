"""The little language of a pipeline definition: `Get`, `Std:Join`, `Std:JsonGet`, and conditions."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from assay.components.contracts.errors import RunError

from ..validate import walk

_TOKEN = re.compile(r"\['([^']+)'\]|\[(\d+)\]|([A-Za-z0-9_\-]+)")
_STEP = re.compile(r"Steps\.([A-Za-z0-9\-_]+)")


@dataclass(frozen=True)
class Scope:
    """What an expression can see."""

    parameters: Mapping[str, Any]
    facts: Mapping[str, str]
    """`Execution.…`"""
    properties: Callable[[str], Mapping[str, Any]]
    """What a step (by its key) answers to `Get`."""
    files: Mapping[str, Mapping[str, str]]
    """Step → property file → `output/path` below the step's outputs."""
    read: Callable[[str], Any]
    """Reads the JSON file of an S3 URI."""
    rounds: Mapping[str, str] = field(default_factory=dict)
    """Inside a loop: a step of the body → its key in this round."""
    item: Any = None

    def key(self, step: str) -> str:
        """Return the name under which a step's state is kept."""
        return self.rounds.get(step, step)

    def inside(self, item: Any, rounds: Mapping[str, str]) -> "Scope":
        """Return the scope of one round of a loop."""
        return replace(self, item=item, rounds={**self.rounds, **rounds})

    def value(self, expression: Any) -> Any:
        """Return an expression's value; what is no expression stays as it is, with its parts evaluated.

        Raises:
            RunError: It names what is not there.
        """
        if isinstance(expression, list):
            return [self.value(part) for part in expression]
        if not isinstance(expression, dict):
            return expression
        if set(expression) == {"Get"}:
            return self._get(expression["Get"])
        if set(expression) == {"Std:Join"}:
            join = expression["Std:Join"]
            return str(join["On"]).join(_text(self.value(part)) for part in join["Values"])
        if set(expression) == {"Std:JsonGet"}:
            return self._json_get(expression["Std:JsonGet"])
        return {name: self.value(part) for name, part in expression.items()}

    def holds(self, condition: Mapping[str, Any]) -> bool:
        """Return whether a condition holds.

        Raises:
            RunError: It compares values of different types, or is of an unknown kind.
        """
        kind = condition["Type"]
        if kind == "Not":
            return not self.holds(condition["Expression"])
        if kind == "Or":
            return any(self.holds(part) for part in condition["Conditions"])
        if kind == "In":
            wanted = self.value(condition["QueryValue"])
            return any(_same(wanted, value) for value in self.value(condition["Values"]))
        left, right = self.value(condition["LeftValue"]), self.value(condition["RightValue"])
        if kind == "Equals":
            return _same(left, right)
        return _compare(kind, left, right)

    def _get(self, path: str) -> Any:
        head, *rest = _tokens(path)
        if head == "Parameters":
            return _follow(self.parameters, rest, path)
        if head == "Execution":
            return _follow(self.facts, rest, path)
        if head == "ForEach":
            return _follow(self.item, rest[1:], path)
        if head == "Steps":
            return _follow(self.properties(self.key(str(rest[0]))), rest[1:], path)
        raise _unknown(path)

    def _json_get(self, call: Mapping[str, Any]) -> Any:
        uri = self.value(call["S3Uri"]) if "S3Uri" in call else self._property_file(call["PropertyFile"]["Get"])
        return _follow(self.read(uri), _tokens(call["Path"]), f"{uri}: {call['Path']}")

    def _property_file(self, path: str) -> str:
        _, step, _, name = (str(token) for token in _tokens(path))
        try:
            output, _, file = self.files[step][name].partition("/")
        except KeyError as error:
            raise _unknown(path) from error
        folder = self._get(f"Steps.{step}.ProcessingOutputConfig.Outputs['{output}'].S3Output.S3Uri")
        return f"{folder.rstrip('/')}/{file}"


def steps_named(value: Any) -> Iterator[str]:
    """Yield the steps that an expression, or anything that holds expressions, reads."""
    if isinstance(value, dict):
        if set(value) == {"Get"} and (match := _STEP.match(str(value["Get"]))):
            yield match[1]
        for part in value.values():
            yield from steps_named(part)
    elif isinstance(value, list):
        for part in value:
            yield from steps_named(part)


def property_files(steps: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Return every step's property files, as `Scope.files` wants them."""
    return {
        step["Name"]: {
            entry["PropertyFileName"]: f"{entry['OutputName']}/{entry['FilePath']}"
            for entry in step.get("PropertyFiles", ())
        }
        for step in walk(steps)
    }


def _tokens(path: str) -> list[str | int]:
    return [int(number) if number else quoted or plain for quoted, number, plain in _TOKEN.findall(path)]


def _follow(value: Any, tokens: list[str | int], path: str) -> Any:
    for token in tokens:
        try:
            value = _named(value, token) if isinstance(value, list) and isinstance(token, str) else value[token]
        except (KeyError, IndexError, TypeError) as error:
            raise _unknown(path) from error
    return value


def _named(entries: list[Any], name: str) -> Any:
    """Return the entry of a list by its name: `Outputs['n']` means the output whose OutputName is n."""
    for entry in entries:
        if name in (entry.get("OutputName"), entry.get("InputName"), entry.get("ChannelName")):
            return entry
    raise KeyError(name)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _same(left: Any, right: Any) -> bool:
    _comparable(left, right)
    return bool(left == right)


def _compare(kind: str, left: Any, right: Any) -> bool:
    _comparable(left, right)
    if kind == "GreaterThan":
        return bool(left > right)
    if kind == "GreaterThanOrEqualTo":
        return bool(left >= right)
    if kind == "LessThan":
        return bool(left < right)
    if kind == "LessThanOrEqualTo":
        return bool(left <= right)
    raise RunError(f"the condition {kind!r} is not known", fix="use one that SageMaker Pipelines has")


def _comparable(left: Any, right: Any) -> None:
    kinds = [
        bool if isinstance(one, bool) else float if isinstance(one, int | float) else type(one) for one in (left, right)
    ]
    if kinds[0] is not kinds[1]:
        raise RunError(f"a condition compares {left!r} with {right!r}, which are of different types")


def _unknown(path: str) -> RunError:
    return RunError(f"the expression {path!r} names what is not there")
