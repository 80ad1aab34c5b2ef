"""Parameter values by their declared type: the IR writes every number as a double."""

import json
from collections.abc import Mapping
from typing import Any

from assay.components.contracts.errors import RunError

from .model import ParameterSpec

_PYTHON: dict[str, type | tuple[type, ...]] = {
    "STRING": str,
    "BOOLEAN": bool,
    "LIST": list,
    "STRUCT": dict,
    "TASK_FINAL_STATUS": dict,
    "TASK_CONFIG": dict,
}


def cast(value: Any, kind: str, where: str) -> Any:
    """Return a value as its declared type.

    Args:
        value: A JSON value.
        kind: A `ParameterType`.
        where: Names the parameter in an error.

    Raises:
        RunError: The value is not of that type.
    """
    if kind in ("NUMBER_INTEGER", "NUMBER_DOUBLE"):
        return _number(value, kind, where)
    if not isinstance(value, _PYTHON[kind]):
        raise _mismatch(value, kind, where)
    return value


def parse_text(text: str, kind: str, where: str) -> Any:
    """Return the value that a container wrote into the file of an output parameter: text as it is, others as JSON.

    Raises:
        RunError: The text is not of that type.
    """
    if kind == "STRING":
        return text
    try:
        value = json.loads(text.strip().lower() if kind == "BOOLEAN" else text)
    except ValueError as error:
        raise _mismatch(text, kind, where) from error
    return cast(value, kind, where)


def bind(given: Mapping[str, Any], definitions: Mapping[str, ParameterSpec], where: str) -> dict[str, Any]:
    """Return a component's parameters: given values by type, then defaults.

    Raises:
        RunError: A parameter is missing, unknown or of another type.
    """
    bound = {}
    for name, spec in definitions.items():
        value = given.get(name, spec.default_value)
        if value is not None:
            bound[name] = cast(value, spec.parameter_type, f"{where}: {name}")
        elif not spec.is_optional and "default_value" not in spec.model_fields_set:
            raise RunError(f"the parameter {name!r} has no value", where=where, fix="give it one")
    return bound


def _number(value: Any, kind: str, where: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _mismatch(value, kind, where)
    if kind == "NUMBER_DOUBLE":
        return float(value)
    if int(value) != value:
        raise _mismatch(value, kind, where)
    return int(value)


def _mismatch(value: Any, kind: str, where: str) -> RunError:
    return RunError(f"{str(value)[:80]!r} is not a {kind}", where=where, fix="correct the value or the declared type")
