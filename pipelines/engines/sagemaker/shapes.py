"""A request against botocore's service model, with the maxima, patterns and enums that botocore itself does not check.

A pipeline's expressions may stand for any value: who calls says what they are worth.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

Problem = tuple[str, str]
"""(place inside the request, what is wrong)"""
Expressions = Callable[[Any, str], tuple[str, int] | None]
"""Given a value and the type wanted, the type it is of (empty: any) and its least length; None for no expression."""
_PYTHON: dict[str, Any] = {
    "structure": (dict,),
    "map": (dict,),
    "list": (list,),
    "string": (str,),
    "integer": (int,),
    "long": (int,),
    "float": (int, float),
    "double": (int, float),
    "boolean": (bool,),
}
_UNICODE = {r"\p{L}": "A-Za-zÀ-\uffff", r"\p{N}": "0-9", r"\p{Z}": r"\s", r"\p{M}": "\u0300-\u036f"}
"""Java's classes, as near as Python's `re` comes to them."""


@cache
def shape(service: str, name: str) -> Any:
    """Return a shape of a service's model, for example `CreateTrainingJobRequest` of `sagemaker`."""
    return _model(service).shape_for(name)


@cache
def _model(service: str) -> Any:
    import botocore.session

    return botocore.session.get_session().get_service_model(service)


def problems(
    shape: Any, value: Any, expressions: Expressions, left_out: frozenset[str] = frozenset()
) -> Iterator[Problem]:
    """Yield everything that is wrong with a request.

    Args:
        shape: Of the request.
        value: The request.
        expressions: Recognises what the service fills in at run time.
        left_out: Required members that the caller does not give, because the service does.
    """
    yield from _check(shape, value, "", expressions, left_out)


def _check(
    shape: Any, value: Any, where: str, expressions: Expressions, left_out: frozenset[str] = frozenset()
) -> Iterator[Problem]:
    kind = shape.type_name
    if (found := expressions(value, kind)) is not None:
        yield from _expression(shape, found, where)
    elif not isinstance(value, _PYTHON.get(kind, (object,))) or (kind != "boolean" and isinstance(value, bool)):
        yield where, f"wanted {kind}, got {str(value)[:60]!r}"
    elif kind == "structure":
        yield from _structure(shape, value, where, expressions, left_out)
    elif kind == "list":
        yield from _bounds(shape, len(value), "items", where)
        for number, entry in enumerate(value):
            yield from _check(shape.member, entry, f"{where}[{number}]", expressions)
    elif kind == "map":
        yield from _bounds(shape, len(value), "entries", where)
        for key, entry in value.items():
            yield from _check(shape.key, key, f"{where}[{key}]: the name", expressions)
            yield from _check(shape.value, entry, f"{where}[{key}]", expressions)
    elif kind == "string":
        yield from _string(shape, value, where)
    elif kind in ("integer", "long", "float", "double"):
        yield from _bounds(shape, value, "", where)


def _structure(
    shape: Any, value: Mapping[str, Any], where: str, expressions: Expressions, left_out: frozenset[str]
) -> Iterator[Problem]:
    for name in shape.required_members:
        if name not in value and name not in left_out:
            yield where, f"{name} is missing"
    for name, entry in value.items():
        place = f"{where}.{name}" if where else name
        if name not in shape.members:
            yield place, "there is no such member"
        elif name in left_out:
            yield place, "the service gives it itself"
        else:
            yield from _check(shape.members[name], entry, place, expressions)


def _string(shape: Any, value: str, where: str) -> Iterator[Problem]:
    rules = shape.metadata
    yield from _bounds(shape, len(value), "characters", where)
    if "enum" in rules and value not in rules["enum"]:
        yield where, f"{value[:60]!r} is none of the {len(rules['enum'])} allowed values"
    if "pattern" in rules and not _pattern(rules["pattern"]).fullmatch(value):
        yield where, f"{value[:60]!r} does not match {rules['pattern'][:80]}"


def _expression(shape: Any, found: tuple[str, int], where: str) -> Iterator[Problem]:
    kind, least = found
    numbers = ("integer", "long", "float", "double")
    same = kind in ("", shape.type_name) or (kind in numbers and shape.type_name in numbers)
    if not same:
        yield where, f"the expression gives {kind}, and {shape.type_name} is wanted"
    if shape.type_name == "string" and least > shape.metadata.get("max", least):
        yield where, f"at least {least} characters, at most {shape.metadata['max']} are allowed"


def _bounds(shape: Any, size: float, unit: str, where: str) -> Iterator[Problem]:
    rules = shape.metadata
    if size > rules.get("max", size):
        yield where, f"{size:g} {unit}".strip() + f", at most {rules['max']} are allowed"
    if size < rules.get("min", size):
        yield where, f"{size:g} {unit}".strip() + f", at least {rules['min']} are wanted"


@cache
def _pattern(text: str) -> re.Pattern[str]:
    for java, python in _UNICODE.items():
        text = text.replace(java, python)
    return re.compile(text, re.DOTALL)
