"""Placeholders: what stands for a value in a command, an argument, a variable or a constant.

A text is substituted in one pass: what a value brings in is never looked at again, so a user's prompt template that
happens to hold `{{$.pipeline_job_name}}` arrives as it was written.
"""

import json
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from assay.components.contracts.errors import RecipeError

RUN = (
    "pipeline_job_name",
    "pipeline_job_uuid",
    "pipeline_job_resource_name",
    "pipeline_job_create_time_utc",
    "pipeline_job_schedule_time_utc",
    "pipeline_task_name",
    "pipeline_task_uuid",
    "pipeline_root",
    "workspace_path",
)
"""Placeholders that say which run this is."""

_ANY = re.compile(r"\{\{\$.*?\}\}")
_RUN = re.compile(r"\{\{\$\.(" + "|".join(RUN) + r")\}\}")
_CHANNEL = re.compile(r"\{\{\$\.inputs\.parameters\['(pipelinechannel--[^']+)'\]\}\}")
_KNOWN = re.compile(
    r"\{\{\$(?:\.(?:"
    r"inputs\.parameters\['(?P<parameter>[^']+)'\]"
    r"|(?P<side>inputs|outputs)\.artifacts\['(?P<artifact>[^']+)'\]\.(?P<field>uri|path|name|metadata)"
    r"(?:\['(?P<key>[^']+)'\])?"
    r"|outputs\.parameters\['(?P<file>[^']+)'\]\.output_file"
    r"|(?P<output>outputs\.output_file|outputs\.output_metadata_uri)"
    r"|(?P<run>" + "|".join(RUN) + r")"
    r"))?\}\}"
)


def check(texts: Iterable[str], *, where: str) -> None:
    """Refuse a placeholder that nothing here knows.

    Raises:
        RecipeError: One of the texts holds such a placeholder.
    """
    for text in texts:
        for found in _ANY.findall(text):
            if not _KNOWN.fullmatch(found):
                raise RecipeError(f"the placeholder {found} is not known", where=where)


def resolve_constant(value: Any, channels: Mapping[str, Any], run: Mapping[str, str]) -> Any:
    """Return a constant of the pipeline with its f-string parts and run placeholders filled in.

    Args:
        value: A JSON value.
        channels: The values that f-strings name (`pipelinechannel--…`).
        run: Values of the `RUN` placeholders.
    """
    if isinstance(value, dict):
        return {key: resolve_constant(entry, channels, run) for key, entry in value.items()}
    if isinstance(value, list):
        return [resolve_constant(entry, channels, run) for entry in value]
    if not isinstance(value, str) or "{{$" not in value:
        return value

    def fill(match: re.Match[str]) -> str:
        if named := _CHANNEL.fullmatch(match[0]):
            return text_of(channels[named[1]]) if named[1] in channels else match[0]
        if known := _RUN.fullmatch(match[0]):
            return run.get(known[1], match[0])
        return match[0]

    return _ANY.sub(fill, value)


def resolve_command(texts: Iterable[str], executor_input: Mapping[str, Any], run: Mapping[str, str]) -> list[str]:
    """Return a command line with every placeholder filled in; `IfPresent` and `Concat` may change its length."""
    inputs = executor_input["inputs"]
    present = inputs["parameterValues"].keys() | inputs["artifacts"].keys()
    parts = [part for text in texts for part in _expand(text, present)]
    return [resolve_text(part, executor_input, run) for part in parts]


def resolve_text(text: str, executor_input: Mapping[str, Any], run: Mapping[str, str]) -> str:
    """Return a text with every placeholder filled in.

    Args:
        text: A template.
        executor_input: KFP's ExecutorInput of the task.
        run: Values of the `RUN` placeholders.

    Raises:
        RecipeError: It names an input or output that the task does not have.
    """
    if "{{$" not in text:
        return text
    return _KNOWN.sub(lambda match: _value(match, executor_input, run), text)


def run_values(texts: Iterable[str], run: Mapping[str, str]) -> dict[str, str]:
    """Return the values of the `RUN` placeholders that texts name: they are part of what a task depends on."""
    names = {name for text in texts for name in _RUN.findall(text)}
    return {name: run[name] for name in sorted(names) if name in run}


def text_of(value: Any) -> str:
    """Return a value as KFP's launcher writes it into a command: numbers plain, lists and structs as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")
    return json.dumps(value)


def _expand(text: str, present: Iterable[str]) -> list[str]:
    if text.startswith(('{"IfPresent"', '{"Concat"')):
        return _unfold(json.loads(text), present)
    return [text]


def _unfold(node: Any, present: Iterable[str]) -> list[str]:
    if isinstance(node, str):
        return [node]
    if isinstance(node, list):
        return [part for entry in node for part in _unfold(entry, present)]
    if "Concat" in node:
        return ["".join(_unfold(node["Concat"], present))]
    if "IfPresent" in node:
        branch = node["IfPresent"]
        return _unfold(branch["Then"] if branch["InputName"] in present else branch.get("Else", []), present)
    raise RecipeError(f"the placeholder {json.dumps(node)} is not known")


def _value(match: re.Match[str], executor_input: Mapping[str, Any], run: Mapping[str, str]) -> str:
    try:
        if name := match["parameter"]:
            return text_of(executor_input["inputs"]["parameterValues"][name])
        if name := match["artifact"]:
            return _field(
                executor_input[match["side"]]["artifacts"][name]["artifacts"][0], match["field"], match["key"]
            )
        if name := match["file"]:
            return str(executor_input["outputs"]["parameters"][name]["outputFile"])
        if match["output"]:
            return str(executor_input["outputs"]["outputFile"])
        if name := match["run"]:
            return run[name]
    except KeyError as error:
        raise RecipeError(
            f"the placeholder {match[0]} has no value ({error})", fix="give the input a default, or use IfPresent"
        ) from error
    return json.dumps(executor_input)


def _field(artifact: Mapping[str, Any], field: str, key: str | None) -> str:
    if field == "metadata":
        metadata = artifact.get("metadata", {})
        return text_of(metadata[key] if key else metadata)
    return str(artifact["name"] if field == "name" else artifact["uri"])
