"""The task template: all of a task that is known before the run, as the container reads it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from assay.pipelines.ir.model import Component

from .expressions import Json
from .values import Constant, Value


def build(
    component: Component,
    entry_point: tuple[str, str],
    parameters: Mapping[str, Value],
    artifacts: Mapping[str, str],
) -> bytes:
    """Return `task.json`: the same bytes for the same task.

    Args:
        component: Declares the types.
        entry_point: `module:function`, and the digest of its code.
        parameters: A constant stands in the template; any other value is an argument of the container.
        artifacts: Folder inside of what the producer left, by the input's name.
    """
    inputs, outputs = component.input_definitions, component.output_definitions
    template: dict[str, Any] = {
        "component": entry_point[0],
        "code_digest": entry_point[1],
        "parameters": {
            name: _parameter(inputs.parameters[name].parameter_type, value) for name, value in parameters.items()
        },
        "artifacts": {
            name: {
                "schema_title": inputs.artifacts[name].artifact_type.schema_title,
                "subfolder": folder,
                "optional": inputs.artifacts[name].is_optional,
            }
            for name, folder in artifacts.items()
        },
        "outputs": {
            "parameters": {name: spec.parameter_type for name, spec in outputs.parameters.items()},
            "artifacts": {name: spec.artifact_type.schema_title for name, spec in outputs.artifacts.items()},
        },
    }
    return (json.dumps(template, sort_keys=True, indent=1) + "\n").encode()


def digest(template: bytes) -> str:
    """Return the sha256 (hex) that names a template's folder."""
    return hashlib.sha256(template).hexdigest()


def _parameter(kind: str, value: Value) -> Json:
    if isinstance(value, Constant):
        return {"type": kind, "value": value.value}
    return {"type": kind, "argument": True}
