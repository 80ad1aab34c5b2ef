"""The template of one task, as an engine without KFP's launcher stores it: all that is known before the run."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Parameter(BaseModel):
    """An input parameter: a constant, or the value of an argument of the container."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str
    value: Any = None
    argument: bool = False


class Artifact(BaseModel):
    """An input artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_title: str = ""
    subfolder: str = ""
    """Where it lies in the folder of its producer, a Training job, which leaves all of its outputs in one."""
    optional: bool = False


class Outputs(BaseModel):
    """What the component writes: parameter → type, artifact → schema title."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: dict[str, str] = {}
    artifacts: dict[str, str] = {}


class Template(BaseModel):
    """What a task is, apart from what earlier steps give it: `task.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    component: str
    """`module:function`."""
    code_digest: str = ""
    parameters: dict[str, Parameter] = {}
    artifacts: dict[str, Artifact] = {}
    outputs: Outputs = Outputs()


def parse(text: str, kind: str) -> Any:
    """Return an argument's text as a value of a KFP parameter type.

    Raises:
        ValueError: It is not of that type.
    """
    if kind == "STRING":
        return text
    return typed(json.loads(text.lower() if kind == "BOOLEAN" else text), kind)


def typed(value: Any, kind: str) -> Any:
    """Return a value as its declared type: JSON that went through KFP writes every number as a double."""
    if value is None or kind not in ("NUMBER_INTEGER", "NUMBER_DOUBLE"):
        return value
    return int(value) if kind == "NUMBER_INTEGER" else float(value)
